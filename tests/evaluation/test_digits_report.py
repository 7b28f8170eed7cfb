import numpy as np

from varjax.data.sources import Digits
from varjax.evaluation import digits_report


def test_real_digits_are_reported_as_good_and_noise_as_bad():
    held_out = Digits().source("held_out")
    table = digits_report.digits_report(held_out.images_NHWC, held_out.labels_N)
    assert table["samples"]["label accuracy"] == table["real held-out digits"]["label accuracy"]
    assert abs(table["samples"]["Fréchet distance"]) < 1e-3
    noise = np.random.default_rng(0).integers(0, 256, held_out.images_NHWC.shape, dtype=np.uint8)
    table = digits_report.digits_report(noise, held_out.labels_N)["samples"]
    assert table["label accuracy"] < 0.3 and table["Fréchet distance"] > 1
    assert table["copying"] == 0


def test_copies_and_sameness_show():
    train = Digits().source("train")
    x_NC = train.images_NHWC.reshape(len(train), -1) / 255.0
    assert digits_report.copying_fraction(x_NC, x_NC) == 1
    assert digits_report.class_diversity(np.ones((4, 3)), np.array([0, 0, 1, 1])) == 0
    np.testing.assert_allclose(
        digits_report.class_diversity(
            np.array([[0.0], [2.0], [0.0], [4.0]]), np.array([0, 0, 1, 1])
        ),
        3,
    )


def test_samples_stand_left_of_real_digits():
    held_out = Digits().source("held_out")
    picture_HWC = digits_report.samples_and_real(held_out.images_NHWC, held_out.labels_N)
    width = (picture_HWC.shape[1] - 40) // 2
    assert np.array_equal(picture_HWC[:, :width], picture_HWC[:, -width:])
