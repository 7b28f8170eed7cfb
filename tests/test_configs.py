"""Tests the shipped configs: their values, arguments, and the shapes of a training step."""

import argparse
import copy
import dataclasses
import functools
import itertools
import pathlib
import re
import struct
import typing

import jax
import numpy as np
import pytest
from PIL import Image

from configs._small import small_tokenizer, small_var
from configs._small_mar import small_kl_tokenizer, small_mar
from varjax import trees
from varjax.analysis.ladder import model_size
from varjax.analysis.run_log import RunLog
from varjax.checkpoints.weights import abstract_params
from varjax.config import config_flags, config_tree
from varjax.convert.weights_dir import write_converted
from varjax.data.sources.folder import Folder
from varjax.data.sources.noise import Noise
from varjax.data.sources.tfds import TFDS
from varjax.errors import InputError
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.losses.lpips import init_lpips
from varjax.tokenizers.vq.task import VQTask
from varjax.training.run_dir import write_config
from varjax.training.task import Plan

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
IMAGES = 1_281_167  # in ImageNet's training split
# batch, epochs, base lr, gate_init, end of lr, final weight decay, drop path, million parameters
OFFICIAL = {
    "var.py:d16": (768, 200, 1e-4, 1e-3, 0.1, 0.05, 0.1 * 16 / 24, 310),
    "var.py:d20": (768, 250, 1e-4, 1e-3, 0.1, 0.05, 0.1 * 20 / 24, 601),
    "var.py:d24": (768, 350, 8e-5, 1e-4, 0.01, 0.05, 0.1, 1033),
    "var.py:d30": (1024, 350, 8e-5, 1e-5, 0.01, 0.08, 0.1 * 30 / 24, 2010),
    "var.py:d36": (768, 350, 8e-5, 5e-6, 0.01, 0.08, 0.1 * 36 / 24, 2354),
}


# λ, microbatches, end of lr, final weight decay, drop path
CCA = {
    "d16": (50, 4, 0.1, 0.05, 0.0),
    "d20": (50, 8, 0.1, 0.05, 0.1 * 20 / 24),
    "d24": (100, 8, 0.01, 0.05, 0.1),
    "d30": (1000, 16, 0.01, 0.08, 0.1 * 30 / 24),
}


def load(name):
    return config_flags.load_config(str(CONFIGS / name))


@pytest.mark.parametrize("name", OFFICIAL)
def test_var_recipes_match_the_official_ones(name):
    e, (batch, epochs, lr, gate, end, decay, drop, millions) = load(name), OFFICIAL[name]
    e.check()
    assert (e.batch_size, e.epochs) == (batch, epochs)
    plan = e.plan(IMAGES)
    assert plan.steps == -(-epochs * IMAGES // batch)
    peak, task = lr * batch / 256, e.task
    warm = round(0.02 * plan.steps)
    steps = np.array([0, warm, warm + 0.05 * (plan.steps - 1 - warm), plan.steps - 1])
    np.testing.assert_allclose(task.optimizer.lr(steps, plan) / peak, [0.005, 1, 1, end], rtol=1e-6)
    np.testing.assert_allclose(task.optimizer.wd(steps[[0, 3]], plan), [0.05, decay])
    assert (task.optimizer.b1, task.optimizer.b2, task.optimizer.clip) == (0.9, 0.95, 2.0)
    assert (task.model.gate_init, task.class_dropout, task.label_smoothing) == (gate, 0.1, 0)
    np.testing.assert_allclose(task.drop_path, drop)
    assert task.model.shared_adaln == ("d36" in name) and not task.ema_decay and not e.data.flip
    size = 512 if "d36" in name else 256
    assert isinstance(e.data, TFDS) and e.data.name == "imagenet2012"
    assert e.data.image_shape == task.tokenizer.image_shape == (size, size, 3)
    params = jax.eval_shape(task.init, jax.random.key(0)).params
    assert round(sum(x.size for x in jax.tree.leaves(params)) / 1e6) == millions


@pytest.mark.parametrize("size", CCA)
def test_cca_recipes_match_the_official_ones(size):
    e, pretraining = load(f"var_cca.py:{size}"), load(f"var.py:{size}")
    e.check()
    task, found = e.task, e.task.optimizer
    values = task.cca.negative_weight, task.accumulate, found.end, found.weight_decay_end
    assert (*values, task.drop_path) == CCA[size]
    assert (task.cca.beta, task.class_dropout, e.batch_size, e.epochs) == (0.02, 0.1, 256, 1)
    plan = e.plan(IMAGES)
    assert plan.steps == 5005
    warm = 100  # 2 % of the epoch, then flat until 5 % of the rest
    steps = np.array([0, warm, warm + 0.05 * (plan.steps - 1 - warm), plan.steps - 1])
    factors = [0.005, 1, 1, found.end]
    np.testing.assert_allclose(found.lr(steps, plan), 2e-5 * np.array(factors), rtol=1e-6)
    assert (task.model, e.data) == (pretraining.task.model, pretraining.data)
    assert (task.sampling.guidance, task.sampling.top_k, task.sampling.top_p) == (1, 900, 0.96)
    assert not task.ema_decay and not task.label_smoothing


def test_cca_takes_model_reference_and_tokenizer_from_one_run():
    for arg, start in (("d16", "var_d16"), ("d20,from=runs/a,data=random", "runs/a")):
        e = load(f"var_cca.py:{arg}")
        assert {e.init_from, e.task.cca.reference, e.task.tokenizer_weights} == {start}
    e, digits = load("digits_cca.py"), load("digits.py")
    e.check()
    assert {e.init_from, e.task.cca.reference, e.task.tokenizer_weights} == {digits.run_dir}
    assert (e.task.model, e.data, e.task.sampling.guidance) == (digits.task.model, digits.data, 1)
    with pytest.raises(InputError, match="cannot read 'from='; allowed are d16.*from=MODEL and"):
        load("var_cca.py:from=")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["var.py:d16,data=random", "var.py:d36,data=random", "var_cca.py:d20,data=random"]
)
def test_a_full_size_var_step_keeps_all_shapes(name):
    e = load(name)
    e.task.check(e.data.image_shape, e.data.classes)
    key = jax.random.key(0)
    state = jax.eval_shape(e.task.init, key)
    frozen = jax.eval_shape(e.task.tokenizer.init, key)
    if e.task.cca is not None:
        frozen = {"tokenizer": frozen, "reference": state.params}
    batch = e.data.make(e.task.accumulate * 2, seed=0).train_batch(0)
    after, metrics = jax.eval_shape(
        functools.partial(e.task.train_step, plan=Plan()), state, frozen, batch, key
    )
    assert not trees.difference(state, after)
    assert metrics["loss_at_scale"].shape == (10,) and metrics["loss"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["tokenizer.py:256,data=random", "tokenizer.py:512,no_lpips,data=random"]
)
def test_a_full_size_tokenizer_step_keeps_all_shapes(name):
    e = load(name)
    e.check()
    e.task.check(e.data.image_shape, e.data.classes)
    key = jax.random.key(0)
    state = jax.eval_shape(e.task.init, key)
    assert sum(x.size for x in jax.tree.leaves(state.params)) == 108_948_355  # as released
    frozen = {"lpips": jax.eval_shape(init_lpips, key)} if e.task.perceptual else {}
    batch = e.data.make(2, seed=0).train_batch(0)
    after, metrics = jax.eval_shape(
        functools.partial(e.task.train_step, plan=Plan()), state, frozen, batch, key
    )
    assert not trees.difference(state, after)
    assert ("perceptual" in metrics) == ("no_lpips" not in name)
    assert metrics["perplexity"].shape == (10,) and metrics["adversarial_weight"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("arg, h", [("256", 16), ("512,no_lpips", 32)])
def test_a_full_size_kl_tokenizer_step_keeps_all_shapes(arg, h):
    e = load(f"kl_tokenizer.py:{arg},data=random")
    e.check()
    e.task.check(e.data.image_shape, e.data.classes)
    assert e.task.model.latent_shape == (h, h, 16)
    key = jax.random.key(0)
    state = jax.eval_shape(e.task.init, key)
    sizes = [x.size for x in jax.tree.leaves(state.params)]
    assert sum(sizes) == 66_456_019 + 1  # as released, plus `latent_std`
    frozen = {"lpips": jax.eval_shape(init_lpips, key)} if e.task.perceptual else {}
    batch = e.data.make(2, seed=0).train_batch(0)
    after, metrics = jax.eval_shape(
        functools.partial(e.task.train_step, plan=Plan()), state, frozen, batch, key
    )
    assert not trees.difference(state, after)
    assert ("perceptual" in metrics) == ("no_lpips" not in arg)


def test_the_kl_tokenizer_recipe_matches_latent_diffusion():
    task, plan = load("kl_tokenizer.py").task, load("kl_tokenizer.py").plan(IMAGES)
    assert (task.l1, task.l2, task.kl, task.gan.weight) == (1, 0, 1e-6, 0.5)
    np.testing.assert_allclose(task.optimizer.lr(np.array([0, 400_000]), plan), 96 * 4.5e-6)
    np.testing.assert_allclose(task.gan.first_step(plan), 50_000, rtol=0.02)


@pytest.mark.parametrize(
    ("size", "guidance", "millions"), [("b", 2.9, 208), ("l", 3.0, 478), ("h", 3.2, 942)]
)
def test_mar_recipes_match_the_official_ones(size, guidance, millions):
    e = load(f"mar.py:{size},data=random")
    e.check()
    e.task.check(e.data.image_shape, e.data.classes)
    assert (e.batch_size, e.epochs, e.task.ema_decay, e.task.diffusion_batch_mul) == (
        2048,
        800,
        0.9999,
        4,
    )
    assert e.task.attention_dropout == e.task.dropout == e.task.class_dropout == 0.1
    assert e.task.sampling.guidance == guidance and e.task.sampling.clip_denoised == 0
    optimizer, plan = e.task.optimizer, e.plan(IMAGES)
    epoch = plan.steps // 800
    lr = optimizer.lr(np.array([0, 50 * epoch, 100 * epoch + 1, plan.steps - 1]), plan)
    np.testing.assert_allclose(lr, [0, 4e-4, 8e-4, 8e-4], rtol=1e-2)
    assert (optimizer.b1, optimizer.b2, optimizer.clip) == (0.9, 0.95, 3.0)
    np.testing.assert_allclose(optimizer.wd(np.array([0, plan.steps - 1]), plan), 0.02)
    key = jax.random.key(0)
    state = jax.eval_shape(e.task.init, key)
    assert round(sum(x.size for x in jax.tree.leaves(state.params)) / 1e6) == millions


@pytest.mark.slow
def test_a_full_size_mar_step_keeps_all_shapes():
    e = load("mar.py:l,data=random")
    key = jax.random.key(0)
    state = jax.eval_shape(e.task.init, key)
    frozen = jax.eval_shape(e.task.tokenizer.init, key)
    batch = e.data.make(2, seed=0).train_batch(0)
    after, metrics = jax.eval_shape(
        functools.partial(e.task.train_step, plan=Plan()), state, frozen, batch, key
    )
    assert not trees.difference(state, after)
    assert metrics["mse"].shape == metrics["vlb"].shape == ()


@pytest.mark.parametrize("tokens", ["continuous", "codes"])
@pytest.mark.parametrize("order", ["masked", "random", "raster"])
def test_digits_mar_arguments_choose_order_tokens_and_run_dir(order, tokens):
    e = load(f"digits_mar.py:{order},{tokens}")
    e.check()
    e.task.check(e.data.image_shape, e.data.classes)
    model = e.task.model
    assert model.causal == (order != "masked")
    assert model.order == ("raster" if order == "raster" else "random")
    assert hasattr(model.head, "vocab") == (tokens == "codes") and model.length == 16
    others = {
        load(f"digits_mar.py:{o},{t}").run_dir for o, t in OTHERS if (o, t) != (order, tokens)
    }
    assert e.run_dir not in others and len(others) == 5


OTHERS = [(o, t) for o in ("masked", "random", "raster") for t in ("continuous", "codes")]


def test_a_tokenizer_config_can_be_overridden_and_saved():
    e = load("tokenizer.py:no_lpips,256")
    e = config_tree.override(e, ["task.gan.start=0.5", "task.gan.optimizer.clip=3.0"])
    assert (e.task.gan.start, e.task.gan.optimizer.clip) == (0.5, 3.0)
    data = config_tree.to_dict(e)["task"]
    assert config_tree.from_dict(VQTask, data) == e.task
    assert config_tree.override(e, ["task.gan=none"]).task.gan is None
    with pytest.raises(ValueError, match="task.perceptual is none in this config"):
        config_tree.override(e, ["task.perceptual.weight=2.0"])


def test_the_data_argument_selects_the_dataset():
    data = load("var.py:d20,data=folder:/data/imagenet").data
    assert data == Folder("/data/imagenet", size=256)
    assert load("mar.py:l,data=folder:/data/imagenet").data == Folder(
        "/data/imagenet", crop="center", flip=True
    )
    assert load("var.py:d36,data=tfds:/data/packed").data == TFDS("/data/packed", size=512)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "var.py:d17",
            "cannot read 'd17'; allowed are d16, d20, d24, d30, d36 and data=KIND:WHERE",
        ),
        (
            "var_cca.py:d36",
            "cannot read 'd36'; allowed are d16, d20, d24, d30, from=MODEL and data=",
        ),
        ("var.py:d16,date=random", "cannot read 'date=random'; allowed are d16, "),
        ("tokenizer.py:256,no_lpip", "cannot read 'no_lpip'; allowed are 256, 512, no_lpips and"),
        ("mar.py:d16", "cannot read 'd16'; allowed are b, l, h and data="),
        ("digits_mar.py:diagonal", "cannot read .'diagonal'.; allowed are masked, random"),
        ("digits_tokenizer.py:two", "cannot read 'two'; allowed is single_scale"),
        ("var.py:d16,data=imagenet", "data is 'imagenet'; give folder:PATH"),
    ],
)
def test_a_wrong_argument_lists_the_allowed_ones(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


def test_digits_configs_match_the_small_image_configs():
    """The digits' configs spell out every value, which must equal that of `configs/_small.py`."""
    tokenizer, var = load("digits_tokenizer.py"), load("digits.py")
    assert tokenizer == small_tokenizer(tokenizer.data, tokenizer.run_dir)
    assert var == small_var(var.data, tokenizer, var.run_dir)


def test_digits_mar_configs_match_the_small_image_configs():
    kl = load("digits_kl_tokenizer.py")
    assert kl == small_kl_tokenizer(kl.data, kl.run_dir)
    for order in ("masked", "random", "raster"):
        mar = load(f"digits_mar.py:{order}")
        assert mar == small_mar(mar.data, kl, mar.run_dir, order)
    codes = load("digits_mar.py:codes")
    single_scale = load("digits_tokenizer.py:single_scale")
    tokenizer = small_tokenizer(single_scale.data, single_scale.run_dir, single_scale=True)
    assert tokenizer == single_scale
    assert codes == small_mar(codes.data, tokenizer, codes.run_dir)


@pytest.mark.parametrize("name", ["digits.py", "digits_tokenizer.py", "digits_kl_tokenizer.py"])
def test_small_configs_fit_their_data(name):
    e = load(name)
    e.check()
    e.task.check(e.data.image_shape, e.data.classes)


@pytest.fixture
def make_folder(tmp_path):
    """Returns a function that writes PNG files in two classes: gray, gray as RGB, or color."""

    def make(kind):
        rng = np.random.default_rng(0)
        for i in range(12):
            split = "val" if i < 4 else "train"
            path = tmp_path / "My Images" / split / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image_HWC = rng.integers(0, 256, (30, 40, 3 if kind == "color" else 1), np.uint8)
            picture = Image.fromarray(image_HWC if kind == "color" else image_HWC[..., 0])
            picture.convert("L" if kind == "gray" else "RGB").save(path)
        return f"data=folder:{tmp_path / 'My Images'}"

    return make


@pytest.mark.parametrize(
    ("kind", "size", "channels", "scales"),
    [
        ("gray", 8, 1, (1, 2, 3, 4)),
        ("color", 12, 3, (1, 2, 3, 4, 6)),
        ("gray as RGB", 28, 1, (1, 2, 3, 4, 5, 7)),
        ("color", 64, 3, (1, 2, 3, 4, 6, 8)),
    ],
)
def test_small_configs_adapt_to_a_folder_of_images(make_folder, kind, size, channels, scales):
    arg = f"{make_folder(kind)},size={size}"
    tokenizer, var = load(f"small_tokenizer.py:{arg}"), load(f"small.py:{arg}")
    for e in (tokenizer, var):
        e.check()
        e.task.check(e.data.image_shape, e.data.classes)
        assert (e.data.image_shape, e.data.classes) == ((size, size, channels), 2)
    assert tokenizer.task.model.scales == scales and var.task.tokenizer == tokenizer.task.model
    assert tokenizer.run_dir == var.task.tokenizer_weights == f"runs/my_images_{size}_tokenizer"


@pytest.fixture
def fashion(tmp_path):
    """Writes files like Fashion-MNIST's, with 20 images in each split; returns the argument."""
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    label_N = np.arange(20) % 10
    arrays = {"images-idx3": np.zeros((20, 28, 28)), "labels-idx1": label_N}
    for split, (kind, array) in itertools.product(("train", "t10k"), arrays.items()):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        path = folder / f"{split}-{kind}-ubyte"
        path.write_bytes(header + array.astype(np.uint8).tobytes())
    return f"data=idx:{folder}"


def parameters(e):
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(e.task.init, jax.random.key(0))))


def test_mnist_files_need_no_size(fashion):
    tokenizer, var = load(f"small_tokenizer.py:{fashion}"), load(f"small.py:{fashion}")
    assert tokenizer.data.image_shape == (28, 28, 1) and var.task.model.classes == 10
    assert tokenizer.run_dir == var.task.tokenizer_weights == "runs/fashion_mnist_28_tokenizer"
    assert load(f"small.py:{fashion},size=28") == var and var.eval_images == 2000
    with pytest.raises(InputError, match="size=32: idx:.* has 28 pixels a side; leave size out"):
        load(f"small.py:{fashion},size=32")
    elsewhere = load(f"small.py:{fashion},tokenizer=runs/other")
    assert elsewhere.task.tokenizer_weights == "runs/other"
    assert var.init_tokenizer and not elsewhere.init_tokenizer


@pytest.mark.parametrize("tokens", ["continuous", "codes"])
@pytest.mark.parametrize("order", ["masked", "random", "raster"])
def test_every_mar_order_and_token_kind_fits_small_images(fashion, order, tokens):
    e = load(f"small_mar.py:{fashion},{order},{tokens}")
    kl, vq = f"small_kl_tokenizer.py:{fashion}", f"small_tokenizer.py:{fashion},single_scale"
    tokenizer = load(kl if tokens == "continuous" else vq)
    for run in (e, tokenizer):
        run.check()
        run.task.check(run.data.image_shape, run.data.classes)
    assert e.task.tokenizer_weights == tokenizer.run_dir
    assert e.task.tokenizer == tokenizer.task.model and e.task.model.length == 49
    assert e.task.model.causal == (order != "masked")


def test_small_image_transformers_have_similar_parameter_counts(fashion):
    var, *others = (
        parameters(load(f"{config}:{fashion}{row}"))
        for config, row in (
            ("small.py", ""),
            *(("small_mar.py", row) for row in ("", ",random", ",raster")),
            *(("small_mar.py", f",codes{order}") for order in ("", ",random", ",raster")),
        )
    )
    assert others == pytest.approx([var] * 6, rel=0.1)


def test_training_steps_follow_from_image_count_and_quality():
    def steps(images, quality):
        data = Noise(28, 1, images=images)
        tokenizer = small_tokenizer(data, "tokenizer", quality)
        return tokenizer.steps, small_var(data, tokenizer, "var", quality).steps

    assert steps(60_000, "quick") == (1200, 1500) and steps(60_000, "good") == (12_000, 30_000)
    assert steps(4500, "quick") == (1200, 1500) and steps(4500, "good") == (3515, 3515)
    assert steps(100, "quick") == steps(100, "good") == (500, 500)


@pytest.mark.parametrize("quality", ["quick", "good"])
def test_var_and_mar_train_on_the_same_number_of_images(quality):
    data = Noise(28, 1, images=60_000)
    vq, kl = small_tokenizer(data, "vq", quality), small_kl_tokenizer(data, "kl", quality)
    var, mar = small_var(data, vq, "var", quality), small_mar(data, kl, "mar", "masked", quality)
    assert var.steps * var.batch_size == mar.steps * mar.batch_size
    assert vq.steps * vq.batch_size == kl.steps * kl.batch_size


def test_every_allowed_image_size_has_scales(make_folder):
    where, allowed = make_folder("gray"), []
    for size in range(1, 70):
        try:
            e = load(f"small_tokenizer.py:{where},size={size}")
        except ValueError as error:
            assert re.search("must be a multiple of|square ones of 8 to 64", str(error))
        else:
            allowed.append(size)
            e.task.check(e.data.image_shape, e.data.classes)
    assert allowed == [*range(8, 17, 2), *range(20, 33, 4), *range(40, 65, 8)]


@pytest.mark.slow
def test_a_small_image_step_of_both_stages_keeps_all_shapes(make_folder):
    """Only shapes are computed here; test_end_to_end.py trains the same recipe on the digits."""
    arg = f"{make_folder('color')},size=28"
    tokenizer, var = load(f"small_tokenizer.py:{arg}"), load(f"small.py:{arg}")
    key, batch = jax.random.key(0), tokenizer.data.make(4, seed=0).train_batch(0)
    weights = jax.eval_shape(tokenizer.task.model.init, key)
    for e, frozen in ((tokenizer, {}), (var, weights)):
        state = jax.eval_shape(e.task.init, key)
        after, metrics = jax.eval_shape(
            functools.partial(e.task.train_step, plan=Plan()), state, frozen, batch, key
        )
        assert not trees.difference(state, after)
        assert metrics["loss"].shape == ()


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("size=28", "give data=folder:DIR,size=28 after the colon"),
        ("data=digits,side=8", "cannot read 'data=digits,side=8'; give data="),
        ("data=digits", "size is ''; give the side of the images"),
        ("data=random,size=30", "size=30: must be a multiple of 4, such as 28 or 32"),
        ("data=random,size=128", "images of 128 by 128 pixels; .* square ones of 8 to 64 pixels"),
        ("data=folder:nowhere,size=28", "nowhere"),
        ("data=digits,size=8,quality=best", "quality is 'best'; allowed are quick, good"),
        ("data=digits,size", "cannot read 'data=digits,size'; give data="),
        ("data=digits,size=8,size=16", "size is given more than once in 'data=digits,size=8,"),
    ],
)
def test_a_wrong_argument_of_small_lists_the_allowed_ones(arg, message):
    with pytest.raises(ValueError, match=message):
        load(f"small.py:{arg}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("var.py:d16,d30", "d16 and d30 exclude each other; give one of them"),
        ("var.py:d16,data=random,data=digits", "data is given more than once in 'd16,data=random,"),
        ("mar.py:tokenizer=kl16,tokenizer=kl_f4", "tokenizer is given more than once"),
        ("small_mar.py:data=random,size=28,masked,raster", "masked and raster exclude each other"),
        ("small_mar.py:data=random,size=28,codes,continuous", "continuous and codes exclude each"),
        ("digits_mar.py:masked,random", "masked and random exclude each other"),
        ("photos_tokenizer.py:normal,kmeans", "normal and kmeans exclude each other"),
        ("ladder.py:d=2,d=3,data=digits,tokenizer=nowhere", "d is given more than once"),
    ],
)
def test_conflicting_or_repeated_arguments_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        load(config)


def test_held_out_takes_a_fraction_or_a_folder(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    arg = f"data=folder:{tmp_path},size=8"
    with pytest.raises(InputError, match=r"chose none of 3 .*Set held_out=0\.\d"):
        load(f"small.py:{arg}").data.source("train")
    shares = {0.9: load(f"small.py:{arg},held_out=0.9").data}
    flags = [f"--config=small_tokenizer:{arg}", "--config.data.held_out=0.6"]
    parser = argparse.ArgumentParser()
    config_flags.add_config_flags(parser)
    shares[0.6] = config_flags.config_from_flags(parser, flags)[1].data
    for share, data in shares.items():
        assert data.held_out == share and data.channels == 3
    for name in ("train", "test"):
        (tmp_path / "split" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "split" / name / "a.png")
    named = load(f"small.py:data=folder:{tmp_path}/split,size=8,held_out=test").data
    assert named.held_out == "test"
    with pytest.raises(InputError, match="held_out=2.0: must be a folder, or a fraction"):
        load(f"small.py:{arg},held_out=2")
    with pytest.raises(InputError, match="held_out=0.3: Digits always holds out the same"):
        load("small.py:data=digits,size=8,held_out=0.3")


def test_a_comma_in_a_path_is_escaped_unless_the_path_exists(make_folder):
    where = make_folder("gray")
    moved = pathlib.Path(where.removeprefix("data=folder:")).rename("a,b")
    for config, others in (("var.py", "d16"), ("mar.py", "b"), ("tokenizer.py", "256")):
        assert load(f"{config}:{others},data=folder:a\\,b").data.root == str(moved)
        with pytest.raises(InputError, match=r"cannot read 'c'.*; write \\, for a comma within a"):
            load(f"{config}:data=folder:a,c,{others}")
    assert load("small.py:data=folder:a\\,b,size=8").data.root == "a,b"
    assert load("small.py:data=folder:a,b,size=8").data.root == "a,b"
    with pytest.raises(InputError, match=r"write \\, for a comma within a path"):
        load("small.py:data=folder:a,c,size=8")


@pytest.mark.parametrize(
    "name, token, map, patch, length",
    [
        ("kl16", 16, (16, 16), 1, 256),
        ("kl_f4", 48, (64, 64), 4, 256),
        ("kl_f8", 16, (32, 32), 2, 256),
        ("kl_f16", 16, (16, 16), 1, 256),
        ("kl_f32", 64, (8, 8), 1, 64),
    ],
)
def test_mar_takes_any_kl_tokenizer(name, token, map, patch, length):
    e = load(f"mar.py:l,tokenizer={name},data=random")
    e.check()
    model, tokenizer = e.task.model, e.task.tokenizer
    assert e.task.tokenizer_weights == f"weights/{name}"
    assert e.data.image_shape == tokenizer.image_shape == (256, 256, 3)
    assert (model.latent_map, model.head.patch, model.length) == (map, patch, length)
    assert model.head.token_shape == (token,) and (model.width, model.head.width) == (1024, 1280)
    assert e.task.sampling.steps == 64
    if name == "kl16":
        assert e == load("mar.py:data=random,l")


def test_mar_takes_a_converted_tokenizer(tmp_path):
    tokenizer = KLConfig(
        (64, 32), width=8, channel_mult=(1, 2, 2), groups=4, latent_channels=5, latent_shift=0.5
    )
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(tokenizer))
    leaves = {"tokenizer": (tokenizer, trees.paths(params))}
    write_converted(tmp_path / "vae", leaves, {})
    task = load(f"mar.py:tokenizer={tmp_path / 'vae'},data=random").task
    assert task.tokenizer == tokenizer and task.tokenizer_weights == str(tmp_path / "vae")
    assert (task.model.head.patch, task.model.grid, task.model.head.channels) == (4, (4, 2), 5)
    assert task.sampling.steps == 8 and task.model.width == 768
    # A config must not read weights, which would use devices before the processes are connected.
    (tmp_path / "vae/tokenizer.safetensors").unlink()
    assert load(f"mar.py:tokenizer={tmp_path / 'vae'},data=random").task == task
    for wrong, message in (
        ("kl_f64", "tokenizer=kl_f64: no such directory, and none of kl16, kl_f4"),
        (tmp_path, "neither to a training run|has no config.json"),
    ):
        with pytest.raises(InputError, match=message):
            load(f"mar.py:tokenizer={wrong}")


def with_value(config, name, value):
    """Returns a copy with one changed field, without running the dataclass's checks."""
    changed = copy.copy(config)
    object.__setattr__(changed, name, value)
    return changed


def with_wrong_choices(config):
    """Yields (path of a Literal field, copy of the config with an invalid value there)."""
    hints = typing.get_type_hints(type(config))
    for name in (field.name for field in dataclasses.fields(config)):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            for path, changed in with_wrong_choices(value):
                yield f"{name}.{path}", with_value(config, name, changed)
        elif "Literal" in str(hints[name]):
            wrong = ("Wrong",) if isinstance(value, tuple) else "Wrong"
            yield name, with_value(config, name, wrong)


def classes_with_choices(kind):
    """Returns all dataclasses with a Literal field, among a dataclass and its fields' types."""
    hints = typing.get_type_hints(kind).values()
    found = {kind} if "Literal" in str([*hints]) else set()
    for inner in {x for hint in hints for x in (hint, *typing.get_args(hint))}:
        if dataclasses.is_dataclass(inner):
            found |= classes_with_choices(inner)
    return found


def test_every_literal_field_is_checked():
    """New Literal fields are covered automatically if one of these configs sets their class."""
    mar = "digits_mar.py", "digits_mar.py:codes"
    names = "var_cca.py:d16", *mar, "tokenizer.py:256", "kl_tokenizer.py"
    experiments = [load(name) for name in names]
    tested = set()
    for experiment in experiments:
        experiment.check()
        for path, changed in with_wrong_choices(experiment):
            with pytest.raises(InputError, match=rf"^{path}(\[0\])? must be one of"):
                changed.check()
            *parts, _ = path.split(".")
            tested.add(type(functools.reduce(getattr, parts, changed)))
    kinds = {type(part) for e in experiments for part in (e, e.task, e.data)}
    assert tested == set().union(*map(classes_with_choices, kinds))


def test_ladder_configs_differ_only_in_size(tmp_path):
    tokenizer = load("digits_tokenizer.py")
    run = tmp_path / "tokenizer"
    write_config(dataclasses.replace(tokenizer, run_dir=str(run)))
    text = f"data=digits,tokenizer={run}"
    ladder = {depth: load(f"ladder.py:d={depth},{text}") for depth in range(2, 11)}
    for depth, e in ladder.items():
        e.check()
        e.task.check(e.data.image_shape, e.data.classes)
        assert e.task.tokenizer == tokenizer.task.model and e.run_dir == f"runs/ladder_d{depth}"
        log = RunLog("run", 64, [], None, config_tree.to_dict(e))
        assert model_size(log) == 4608 * depth**3
        model = e.task.model
        same = dataclasses.replace(model, depth=2, width=32, heads=2)
        same = dataclasses.replace(e, task=dataclasses.replace(e.task, model=same))
        assert dataclasses.replace(same, run_dir="runs/ladder_d2") == ladder[2]
    for wrong in (f"d=11,{text}", text, f"d=2,{text},size=8", "d=2,data=digits"):
        with pytest.raises(InputError, match="give d=2 … 10, data and tokenizer"):
            load(f"ladder.py:{wrong}")
    write_config(dataclasses.replace(load("digits_kl_tokenizer.py"), run_dir=f"{run}_kl"))
    with pytest.raises(InputError, match="has a KLConfig; VAR needs"):
        load(f"ladder.py:d=2,{text}_kl")
