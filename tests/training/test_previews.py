import numpy as np
from PIL import Image

from varjax.storage.captioned_grid import Captions
from varjax.training.metric_writers import MetricWriter
from varjax.training.previews import preview_captions, preview_labels


def captions(name, shape, class_names=()):
    return preview_captions("/some/where/runs/a", 1000, name, shape, class_names)


def test_rows_of_reconstructions_are_named():
    title = "runs/a · reconstructions after step 1,000"
    for rows, names in (
        (1, ["reconstruction"]),
        (2, ["original", "reconstruction"]),
        (4, ["original", "scale 1", "scale 2", "scale 3"]),
    ):
        assert captions("reconstructions", (rows, 8, 4, 4, 1)) == Captions(title, rows=names)


def test_samples_are_named_by_their_classes():
    shape, names = (16, 4, 4, 1), [f"class {k}" for k in range(1000)]
    few, many = captions("samples", shape, names[:10]), captions("samples", shape, names)
    assert few.tiles == [*names[:10], *names[:6]]
    assert many.tiles == [names[label] for label in preview_labels(1000)]
    assert many.tiles[:2] == ["class 0", "class 62"] and many.tiles[-1] == "class 937"
    assert not captions("inputs", shape, names).tiles and not captions("samples", shape).tiles
    assert captions("samples", (5, 4, 4, 1), names).title == "runs/a · samples after step 1,000"


def test_captions_enlarge_a_preview(tmp_path):
    rows_RBHWC = np.zeros((3, 8, 16, 16, 1), np.float32)
    sizes = []
    with MetricWriter(tmp_path, 0) as writer:
        writer.images(1, "reconstructions", rows_RBHWC)
        writer.images(2, "reconstructions", rows_RBHWC, captions("", rows_RBHWC.shape))
    for path in sorted((tmp_path / "previews").iterdir()):
        with Image.open(path) as picture:
            sizes.append(picture.size)
    without, with_words = sizes
    assert with_words[0] > without[0] + 30 and with_words[1] > without[1]
