from varjax.sampling.grid_output import PictureWords, grid_captions, grid_columns


def test_each_class_fills_whole_rows():
    assert [grid_columns(4, count) for count in (1, 2, 8, 20)] == [None, 2, 8, 20]
    assert [grid_columns(4, count) for count in (100, 48, 37)] == [20, 16, 37]
    assert [grid_columns(1, count) for count in (1, 8, 9, 100)] == [None, 8, None, None]


def test_captions_name_each_class_once():
    def captions(names, columns=None):
        return grid_captions(PictureWords("a", names), len(names), columns)

    assert captions([*"1122"], 2).rows == ["1", "2"]
    assert captions([*"11112222"], 2).rows == ["1", "", "2", ""]
    assert captions([*"1234"], 1).tiles == captions([*"1234"]).tiles == [*"1234"]
    assert captions([*"112"], 2).rows == ["1", "2"]
    assert captions([*"3333"]).title == "a · class 3" and not captions([*"3333"]).rows
    assert captions(["7 bag"] * 4).title == "a · 7 bag"
