import pytest

from varjax.convert import model_list
from varjax.convert.name_maps import RELEASES


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VARJAX_CACHE", str(tmp_path))
    (tmp_path / "var_d16").mkdir()


@pytest.fixture(scope="module")
def models():
    return {model.name: model for model in model_list.list_models()}


def test_every_release_is_listed_with_the_size_in_its_paper(models):
    assert models.keys() == RELEASES.keys()
    # In millions, from VAR's Table 1 and MAR's Table 4.
    sizes = {"var_d16": 310, "var_d20": 600, "var_d24": 1030, "mar_b": 208, "mar_h": 943}
    for name, millions in sizes.items():
        assert models[name].parameters / 1e6 == pytest.approx(millions, rel=0.01), name
    assert models["var_d36"].image_shape == (512, 512, 3)
    assert models["mar_l"].image_shape == models["var_d30_cca"].image_shape == (256, 256, 3)
    assert models["kl16"].image_shape is None


def test_the_best_published_fid_is_listed_with_its_settings(models):
    assert models["var_d16_ddo"].fid == 2.54
    assert models["var_d16_ddo"].options.startswith("--guidance=1.4 --top_k=0")
    assert "--refiner=var_d16_code_refiner_8" in models["var_d30_code_drafter_8"].options
    assert models["vae_ch160v4096z32"].fid is None


def test_the_command_shows_which_models_are_cached(cache, capsys):
    assert model_list.main(["var_d16", "var_d20"]) == 0
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[head.index("here") + 1]) for row in rows] == [
        ("var_d16", "yes"),
        ("var_d20", "no"),
    ]


def test_an_unknown_name_is_refused(capsys):
    assert model_list.main(["var_d17"]) == 1
    assert "var_d17" in capsys.readouterr().err
