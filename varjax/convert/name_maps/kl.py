"""Maps the official KL tokenizers (`AutoencoderKL` of latent diffusion, used by MAR) to ours."""

import dataclasses
import math
import pathlib
import sys
from typing import Any

import numpy as np

from varjax.convert.name_maps.autoencoder import (
    autoencoder_links,
    groups_option,
    infer_attention,
    infer_autoencoder,
)
from varjax.convert.name_maps.diffusers import is_diffusers
from varjax.convert.name_maps.name_map import (
    Link,
    NameMap,
    Source,
    Tensors,
    conv_links,
    field_differences,
    fields_of,
    option,
    parse_side,
    tensor_shape,
)
from varjax.convert.name_maps.release import PublishedFile, Release
from varjax.convert.weights_dir import sha256_of
from varjax.errors import InputError, check_setting
from varjax.nn.autoencoder import COARSEST, downsampling
from varjax.storage import files
from varjax.tokenizers.kl.model import LATENT_STD_PATH, KLConfig

# A copy of the official files. At this commit, the files are unchanged. Later commits have
# .safetensors instead, and MAR-B's is reported to hold weights that are not averaged. The hashes
# are those of downloads at this commit. KL-16's is also that of the file on MAR's page.
MAR_REPO, MAR_COMMIT = "jadechoghari/mar", "773c9bdcd98740c7b876ce0d66f684a0e2468990"
MAR_PAGE = "https://github.com/LTH14/mar"
KL16 = PublishedFile(
    "kl16.ckpt",
    MAR_REPO,
    MAR_COMMIT,
    sha256="34ce001bcfffb7af67ec8af1e683a30d7bd45760855ddc7deedc1330f2cfd38f",
)
KL16_SCALE = 0.2325  # of the released KL-16, in MAR's code
KL16_SIZES = ("width", "blocks", "image_channels")  # that MAR's code fixes
SCALE_FACTOR = "scale_factor"  # a tensor of latent diffusion models that measured their scale
SD, SDXL, FLUX = (0.18215, 0.0), (0.13025, 0.0), (0.3611, 0.1159)
# SHA-256 of published files that do not hold their scale -> (scale, shift). The digests are those
# shown on the pages of Hugging Face's Hub.
KNOWN_FILES = {
    # stabilityai/sd-vae-ft-mse-original and -ema-original: .ckpt and .safetensors of each
    "c6a580b13a5bc05a5e16e4dbb80608ff2ec251a162311590c1f34c013d7f3dab": SD,
    "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75": SD,
    "0b204ad0cae549e0a7e298d803d57e36363760dec71c63109c1da3e1147ec520": SD,
    "95f26a5ab04779d5467d1fcecaf93160ffa523afe399b835b3e1bb77ff2d937a": SD,
    # whole models: sd-v1-4.ckpt, v1-5-pruned-emaonly.ckpt, v2-1_768-ema-pruned.ckpt
    "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556": SD,
    "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": SD,
    "ad2a33c361c1f593c4a1fb32ea81afce2b5bb7d1983c6b94793a26a3b54b08a0": SD,
    # sdxl_vae.safetensors, and the whole sd_xl_base_1.0.safetensors
    "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e": SDXL,
    "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b": SDXL,
    # ae.safetensors of FLUX.1
    "afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38": FLUX,
}


def image_size_option() -> Any:
    """Makes the option `image_size`, which MAR has too."""
    about = "pixels of KL or MAR images: 512 or 256x384 (the file's)"
    return option(None, about, parse_side, "pixels like 256, or 256x384")


@dataclasses.dataclass(frozen=True)
class KLConvertOptions:
    """Holds the settings that the tensors of an `AutoencoderKL` do not determine.

    Attributes:
        groups: number of groups in each group norm. None for the number in the config.json that
            diffusers writes next to the file, otherwise 32.
        image_size: pixels of both sides, or (height, width). None for the size that a MAR
            transformer's map has, otherwise 256.
        latent_scale: factor on the latents, 1 / standard deviation. None for the value in the file,
            or the known value for that file; see `latent_units`.
        latent_shift: number subtracted from the latents before scaling. None for the value in the
            file, or the known value for that file, otherwise 0.
    """

    groups: int | None = groups_option()
    image_size: int | tuple[int, int] | None = image_size_option()
    latent_scale: float | None = option(
        None, "factor on a KL tokenizer's latents (the file's; 0.2325 for kl16.ckpt)", float
    )
    latent_shift: float | None = option(
        None, "number subtracted from the latents first (the file's, else 0)", float
    )

    def __post_init__(self):
        if (scale := self.latent_scale) is not None:
            valid = scale > 0 and math.isfinite(scale)
            allowed = "above 0: 1 / standard deviation of latents"
            check_setting("latent_scale", scale, valid, allowed)


def infer_kl(tensors: Tensors, options: KLConvertOptions) -> KLConfig:
    """Infers the config of an `AutoencoderKL`; the options supply the image size.

    Raises InputError for tensors that are missing or contradict each other.
    """
    sizes = infer_autoencoder(tensors)
    levels = len(sizes["channel_mult"])
    features, latent_channels = _features(tensors), _latent_channels(tensors)
    return KLConfig(
        image_size=options.image_size or KLConfig.image_size,
        groups=KLConfig.groups if options.groups is None else options.groups,
        latent_channels=latent_channels,
        encoder_attention=infer_attention(tensors, "encoder", levels),
        decoder_attention=infer_attention(tensors, "decoder", levels),
        feature_channels=None if features == latent_channels else features,
        quant_convs=_has_quant_convs(tensors),
        latent_shift=options.latent_shift or 0.0,
        **sizes,
    )


def kl_latent_options(tensors: Tensors) -> dict[str, Any]:
    """Returns options for a model of the latents: their channels and pixels."""
    channel_mult = infer_autoencoder(tensors)["channel_mult"]
    return {
        "latent_channels": _latent_channels(tensors),
        "downsampling": downsampling(channel_mult),
    }


def kl_table(config: KLConfig) -> list[Link]:
    """Lists all tensors of the official `AutoencoderKL`."""
    attention = config.encoder_attention, config.decoder_attention
    links = list(autoencoder_links(config, True, *attention))
    if config.quant_convs:
        links += conv_links("quant_conv", "quant_conv")
        links += conv_links("post_quant_conv", "post_quant_conv")
    return links


def kl_constants(options: KLConvertOptions) -> dict[str, np.ndarray]:
    """Returns the parameter that official files lack: the scale, which the official code has."""
    scale = KL16_SCALE if options.latent_scale is None else options.latent_scale
    return {LATENT_STD_PATH: np.array(1 / scale, np.float32)}


def kl_official_constants(config: KLConfig) -> dict[str, np.ndarray]:
    """Returns the scale in the official code, which has one only for MAR's KL-16."""
    return kl_constants(KLConvertOptions()) if is_kl16(config) else {}


def kl_differences(config: KLConfig) -> list[str]:
    """Lists the settings that differ from the official code of latent diffusion and MAR."""
    names = ("groups", "quant_convs", "latent_shift")
    official = {name: getattr(KLConfig, name) for name in names}
    if is_kl16(config):  # MAR's code fixes these, and has one number for latents and features
        official |= {name: getattr(KLConfig, name) for name in KL16_SIZES}
        official["features"] = config.latent_channels
    return field_differences(config, official)


def is_kl16(config: KLConfig) -> bool:
    """Returns whether a tokenizer is MAR's KL-16, the only known one with such attention levels."""
    return (config.encoder_attention, config.decoder_attention) == (COARSEST, ())


def _latent_channels(tensors: Tensors) -> int:
    if _has_quant_convs(tensors):
        return tensor_shape(tensors, "post_quant_conv.weight", 4)[1]
    return _features(tensors)


def _features(tensors: Tensors) -> int:
    both = tensor_shape(tensors, "encoder.conv_out.weight", 4)[0]
    if both % 2:
        raise InputError(
            f"encoder.conv_out.weight has {both} outputs; means and log variances need an even "
            "number"
        )
    return both // 2


def _has_quant_convs(tensors: Tensors) -> bool:
    return bool({"quant_conv.weight", "post_quant_conv.weight"} & tensors.keys())


def kl_file_options(
    source: Source, location: pathlib.Path, options: KLConvertOptions
) -> dict[str, Any]:
    """Finds what only the file, its digest, or diffusers' config.json next to it determines.

    Args:
        source: file of the tokenizer.
        location: file as the user gave it, whose folder may contain a config.json.
        options: options of the conversion, which take precedence.

    Returns:
        Options by name: "groups", "latent_scale", "latent_shift"; those that stay as they are may
        be missing.

    Raises:
        InputError: like `latent_units`, and for a config.json with values that are not numbers.
    """
    found: dict[str, Any] = {}
    if options.groups is None and is_diffusers(source.held):
        groups = _groups_from_config(location)
        if groups != KLConfig.groups:
            path = location.parent / "config.json"
            print(f"note: {location}: norms have {groups} groups, as {path} says", file=sys.stderr)
        found["groups"] = groups
    return found | latent_units(source, location, options)


def latent_units(
    source: Source, location: pathlib.Path, options: KLConvertOptions
) -> dict[str, float]:
    """Finds `latent_scale` and `latent_shift` if the options omit them.

    Prints their origin on stderr, unless the flags set them or the file is MAR's KL-16.

    Args:
        source: file of the tokenizer.
        location: file as the user gave it, whose folder may contain a config.json.
        options: options of the conversion, which take precedence.

    Raises:
        InputError: neither the flag, nor the file, nor its digest determines the scale.
    """
    given = options.latent_scale
    if given is not None and options.latent_shift is not None:
        return {}
    units, origin = None, ""
    if SCALE_FACTOR in source.held:
        units = given or _scale_factor(source.held[SCALE_FACTOR]), 0.0
        origin = f"according to its {SCALE_FACTOR}"
    elif is_diffusers(source.held) and (units := _units_from_config(location, given is not None)):
        origin = f"according to {location.parent / 'config.json'}"
    elif is_kl16(infer_kl(source.tensors, options)):
        return {"latent_scale": KL16_SCALE if given is None else given}
    else:
        (digest,) = sha256_of(source.files[:1]).values()
        units, origin = KNOWN_FILES.get(digest), "as published for this file"
    if given is not None:
        units = given, units[1] if units else 0.0
    if units is None:
        raise InputError(
            "this file does not hold the scale of its latents, and its SHA-256 is unknown; give "
            f"--latent_scale: {SD[0]} for Stable Diffusion 1 and 2, {SDXL[0]} for SDXL, {FLUX[0]} "
            f"(and --latent_shift={FLUX[1]}) for FLUX, 0.22765929 for RDM's f16. Otherwise give 1, "
            "measure latent_scale with `varjax evaluate-tokenizer`, and convert again with it"
        )
    scale, shift = units
    shift = shift if options.latent_shift is None else options.latent_shift
    if given is None:
        shifted = f" after subtracting {shift:g}" if shift else ""
        about = f"latents are multiplied by {scale:g}{shifted}"
    else:
        about = f"{shift:g} is subtracted from the latents"
    if given is None or shift:
        print(f"note: {location}: {about}, {origin}", file=sys.stderr)
    return {"latent_scale": scale, "latent_shift": shift}


def _scale_factor(tensor: np.ndarray) -> float:
    if tensor.size != 1 or not np.isrealobj(tensor):
        raise InputError(f"{SCALE_FACTOR} is {tensor.dtype} {tensor.shape}; expected one number")
    return _checked(SCALE_FACTOR, float(np.asarray(tensor).reshape(())))


def _read_diffusers_config(path: pathlib.Path) -> dict[str, Any] | None:
    """Reads diffusers' config.json of an autoencoder; None if it is missing or another model's."""
    config = files.read_json(path) if files.exists(path) else {}
    return config if str(config.get("_class_name")).startswith("Autoencoder") else None


def _groups_from_config(location: pathlib.Path) -> int:
    """Reads the number of groups from diffusers' config.json next to the weights, otherwise 32."""
    path = location.parent / "config.json"
    groups = (_read_diffusers_config(path) or {}).get("norm_num_groups", KLConfig.groups)
    if type(groups) is not int or groups < 1:
        raise InputError(
            f"{path}: norm_num_groups={groups!r}; expected a whole number above 0; correct it, or "
            "give --groups"
        )
    return groups


def _units_from_config(location: pathlib.Path, scaled: bool) -> tuple[float, float] | None:
    """Reads (scale, shift) from diffusers' config.json next to the weights; None without one.

    scaled: whether a flag replaces the file's scale, which is then ignored.
    """
    path = location.parent / "config.json"
    if (config := _read_diffusers_config(path)) is None:
        return None
    # Older files omit the scale; diffusers' default is that of Stable Diffusion.
    scale = SD[0] if scaled else config.get("scaling_factor", SD[0])
    shift = config.get("shift_factor") or 0.0
    for name, value in (("scaling_factor", scale), ("shift_factor", shift)):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{path}: {name}={value!r}; expected a finite number")
    return _checked("scaling_factor", float(scale)), float(shift)


def _checked(name: str, scale: float) -> float:
    if not (scale > 0 and math.isfinite(scale)):
        raise InputError(f"{name}={scale}: expected a finite number above 0; give --latent_scale")
    return scale


KL_MAP = NameMap(
    part="tokenizer",
    flag="kl",
    description="a KL tokenizer (AutoencoderKL)",
    known_by="encoder.mid.attn_1.q.weight",
    config=KLConfig,
    options=KLConvertOptions,
    infer=infer_kl,
    table=kl_table,
    constants=kl_constants,
    official_constants=kl_official_constants,
    official_differences=kl_differences,
    option_values=fields_of("groups", "image_size", "latent_shift"),
    file_options=kl_file_options,
    latent_options=kl_latent_options,
    prefix="first_stage_model.",  # in a checkpoint of a whole latent diffusion model
    ignored=("loss.",),  # LPIPS and the discriminator, in checkpoints of the tokenizer's training
    releases={"kl16": Release({"kl": KL16}, license="MIT", page=MAR_PAGE)},
)
