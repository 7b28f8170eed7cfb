"""Converts official PyTorch weights into a directory of weights."""

import contextlib
import dataclasses
import os
import pathlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from varjax.convert.apply_map import is_weight, lazy_leaves
from varjax.convert.name_maps import RELEASES, kinds, option_fields
from varjax.convert.name_maps.diffusers import with_official_names
from varjax.convert.name_maps.name_map import NameMap, Source, Tensors
from varjax.convert.official_files import (
    AVERAGED,
    HMAR,
    HMAR_NAMES,
    averaged_key,
    find_state_dicts,
    local_files,
    own_tensors,
    read_files,
    warn_not_finite,
)
from varjax.convert.sidecar import Sidecar, read_sidecar
from varjax.convert.weights_dir import (
    CONVERT_OPTIONS,
    check_weights_dir,
    converted_files,
    sha256_of,
    write_converted,
)
from varjax.errors import InputError, errors_naming
from varjax.storage.files import as_path
from varjax.storage.untrusted import abridged


def convert(
    out: str | os.PathLike,
    options: Mapping[str, Any] | None = None,
    ema: bool | None = None,
    **files: str | os.PathLike | None,
) -> dict[str, Any]:
    """Writes a directory of weights from official .pth or .safetensors files.

        varjax.convert_weights("weights/d16", tokenizer="vae_ch160v4096z32.pth", var="var_d16.pth")
        varjax.convert_weights("weights/mar_b", kl="kl16.ckpt", mar="checkpoint-last.pth")

    Weights of any floating-point format become float32. Tensors with NaN or infinite numbers are
    listed on stderr. Settings come from NAME.varjax.json if that file is next to the weights, where
    `convert_to_torch` writes it. If anything fails or the disk fills up, nothing is left at `out`.

    Args:
        out: directory to write. An existing one is replaced only if it holds the same models.
        options: settings that the files do not contain, by name: {"groups": 16}; the `options` of
            the name maps.
        ema: True reads a checkpoint's EMA weights, False the others; None reads the EMA
            weights if there are any.
        files: official files by flag: a tokenizer (`tokenizer` or `kl`), a model of its latents
            (`var` or `mar`), or both. A checkpoint of VAR's trainer given as `var` serves as both.
            For a checkpoint in several parts, give the index that names them,
            MODEL.safetensors.index.json.

    Returns:
        The config found for each part.

    Raises:
        InputError: lists every damaged or unsuitable file, every tensor that does not fit its
            model, the options that none of these models has, or the reason why the models do not
            fit each other.
    """
    options = {name: x for name, x in (options or {}).items() if x is not None}
    for kind, names, known in (("part", files, kinds()), ("option", options, option_fields())):
        if unknown := names.keys() - known.keys():
            raise InputError(
                f"unknown {kind} {', '.join(unknown)}; known {kind}s are {', '.join(known)}"
            )
    changed = {name: x for name, x in options.items() if x != option_fields()[name]["default"]}
    if ema is not None:
        changed["ema"] = ema
    out = as_path(out)
    locations = {flag: as_path(file) for flag, file in files.items() if file is not None}
    check_request(out, locations)
    sources = _read_sources(locations, ema)
    used = {field.name for x in sources.values() for field in dataclasses.fields(x.kind.options)}
    if unused := [name for name in options if name not in used]:
        models = " or ".join(source.kind.description for source in sources.values())
        raise InputError(f"{', '.join(unused)}: no option of {models}; leave it out")
    check_weights_dir(out, converted_files(sources))
    sidecars = _read_sidecars(sources, locations, options)
    for part, source in sources.items():
        location = locations.get(source.kind.flag, source.path)
        with errors_naming(location):
            own = source.kind.own_options(options)
            if part not in sidecars:
                options |= source.kind.file_options(source, location, own)
    known = {part: sidecar.config for part, sidecar in sidecars.items()}
    configs = infer_configs(sources, options, known)
    models, problems, sampling = {}, Problems(), None
    for part, config in configs.items():
        source = sources[part]
        with problems.collected(), errors_naming(source.path):
            leaves = lazy_leaves(config, source.tensors, source.kind.own_options(options))
            models[part] = config, leaves
            if part in sidecars:
                leaves |= sidecars[part].constants
        if source.kind.sampling:
            sampling = source.kind.sampling(config)
    problems.check()
    for source in sources.values():
        weights = {name: x for name, x in source.tensors.items() if is_weight(name)}
        warn_not_finite(source.path, weights)
    paths = dict.fromkeys(path for source in sources.values() for path in source.files)
    digests = sha256_of(paths)
    about: dict[str, Any] = {CONVERT_OPTIONS: changed}
    main = _main_part(sources)
    if main in sidecars:
        sidecar = sidecars[main]
        about |= sidecar.about
        sampling = sidecar.sampling
        if "license" in about:
            print(f"{sources[main].path}: license {about['license']}", file=sys.stderr)
    elif name := published_name(sources, configs, digests):
        release = RELEASES[name]
        print(f"{name}: license {release.license}", file=sys.stderr)
        about |= {"release": name, "license": release.license}
        sampling = release.sampling or sampling
    write_converted(out, models, digests, sampling, about)
    return configs


def check_request(out: pathlib.Path, flags: Collection[str]) -> None:
    """Checks what can be checked before any file is read or downloaded.

    Args:
        out: directory to write; see `convert`.
        flags: flags that give the official files.

    Raises:
        InputError: these models do not belong together, or `out` has other files.
    """
    if not flags:
        raise InputError("nothing to convert; give a tokenizer, a transformer or both")
    parts = [kinds()[flag].part for flag in flags]
    if duplicates := [flag for flag in flags if parts.count(kinds()[flag].part) > 1]:
        names = " and ".join(f"--{flag}" for flag in duplicates)
        raise InputError(f"{names} both give the {kinds()[duplicates[0]].part}; omit one of them")
    if len(models := [flag for flag in flags if kinds()[flag].reads]) > 1:
        names = " and ".join(f"--{flag}" for flag in models)
        raise InputError(f"{names} are both models of latents; a directory has room for only one")
    others = [flag for flag in flags if kinds()[flag].part != "tokenizer" and flag not in models]
    if others and len(flags) > 1:  # a classifier
        raise InputError(
            f"--{others[0]} needs a directory for itself; convert the other files separately"
        )
    # A checkpoint of a trainer may turn out to hold the tokenizer as well.
    check_weights_dir(out, converted_files([*parts, "tokenizer"]))


def published_name(
    sources: Mapping[str, Source], configs: Mapping[str, Any], digests: Mapping[str, str]
) -> str | None:
    """Finds the published model in files by their SHA-256, or by name if no SHA-256 is known.

    Args:
        sources: source of each part. The transformer's file decides, without one the tokenizer's.
        configs: config of each part.
        digests: SHA-256 of the files, as `sha256_of` gives them.

    Returns:
        The name in RELEASES, or None.
    """
    part = _main_part(sources)
    kind, path = sources[part].kind, sources[part].path
    for name, release in RELEASES.items():
        file = release.files.get(kind.flag)
        if file is None or (part == "tokenizer" and len(release.files) > 1):
            continue
        # A file that is on no hub may have the name that every trainer gives to its checkpoints.
        named = file.sha256 is None and file.repo is not None and file.basename == path.name
        # By path where another file has the same name.
        digest = digests.get(path.name, digests.get(str(path), ""))
        if digest == file.sha256 or named:
            if release.config is None or kind.same_sizes(release.config, configs[part]):
                return name
    return None


class Problems:
    """Collects users' mistakes, so that one message lists them all.

    problems = Problems()
    for path in paths:
        with problems.collected():
            read(path)
    problems.check()
    """

    def __init__(self):
        self._messages: list[str] = []

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Keeps the message of an InputError instead of raising it."""
        try:
            yield
        except InputError as error:
            self._messages.append(str(error))

    def check(self) -> None:
        """Raises one InputError with all messages, if there are any."""
        if self._messages:
            raise InputError("\n".join(self._messages))


def _main_part(parts: Iterable[str]) -> str:
    """Returns the part whose file says what is published and how it is sampled."""
    return next((part for part in parts if part != "tokenizer"), "tokenizer")


def _read_sidecars(
    sources: Mapping[str, Source],
    locations: Mapping[str, pathlib.Path],
    options: Mapping[str, Any],
) -> dict[str, Sidecar]:
    """Reads the JSON files next to those that the user gave, by part, and prints a note of each."""
    sidecars, problems = {}, Problems()
    for part, source in sources.items():
        # A trainer's checkpoint may also hold a tokenizer, which no JSON file describes.
        if (location := locations.get(source.kind.flag)) is not None:
            with problems.collected():
                if sidecar := read_sidecar(location, source, options):
                    sidecars[part] = sidecar
                    print(f"note: {location}: settings are from {sidecar.path}", file=sys.stderr)
    problems.check()
    return sidecars


def _read_sources(files: Mapping[str, pathlib.Path], ema: bool | None) -> dict[str, Source]:
    """Reads the source of each part; a model's file may also contain its tokenizer."""
    parts = [kinds()[flag].part for flag in files]
    sources: dict[str, Source] = {}
    problems, averaged = Problems(), False
    # In the order of `infer_configs`, so that problems of the model's file are listed first.
    for flag in sorted(files, key=lambda flag: kinds()[flag].part == "tokenizer"):
        path = files[flag]
        with problems.collected():
            local = local_files(path)
            checkpoint = read_files(local)
            if key := averaged_key(checkpoint):
                averaged = True
                if ema is None:
                    print(f"note: {path}: using the EMA weights ({key})", file=sys.stderr)
            with errors_naming(path):
                state_dicts = find_state_dicts(checkpoint, ema)
                if not state_dicts.keys() & {"", flag}:
                    inside = ", ".join(str(kinds()[other].trainer_key) for other in state_dicts)
                    raise InputError(f"is a trainer's checkpoint that holds only {inside}")
                state_dict = state_dicts.get(flag) or state_dicts[""]
                sources[kinds()[flag].part] = _source(local, flag, state_dict)
                if "tokenizer" in state_dicts and "tokenizer" not in parts:
                    sources["tokenizer"] = _source(local, "tokenizer", state_dicts["tokenizer"])
    problems.check()
    if ema and not averaged:
        names = ", ".join(map(str, files.values()))
        keys = ", ".join(AVERAGED)
        raise InputError(f"ema=True, but {names} has no EMA weights ({keys})")
    return sources


def _source(files: Sequence[pathlib.Path], flag: str, held: Tensors) -> Source:
    path, tensors = files[0], with_official_names(held)
    kind = find_kind(tensors, flag)
    own, others = own_tensors(kind, tensors)
    if others:
        left_out = ", ".join(abridged(others))
        print(
            f"note: {path}: not part of {kind.description}, left out: {left_out}", file=sys.stderr
        )
    return Source(path, kind, own, held, tuple(files))


def infer_configs(
    sources: Mapping[str, Source],
    options: Mapping[str, Any],
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Infers the configs of models that belong together.

    Args:
        sources: source of each part: "tokenizer", "var" or "mar".
        options: settings that the files do not contain, by name.
        known: configs that need not be inferred, by part.

    Returns:
        The config of each part.

    Raises:
        InputError: a file lacks tensors or contradicts itself, or the models do not fit each other.
    """
    tokenizer = sources.get("tokenizer")
    models = [source for part, source in sources.items() if tokenizer and part != "tokenizer"]
    for source in models:
        assert tokenizer is not None
        if source.kind.reads not in (None, tokenizer.kind.config):
            raise InputError(
                f"{source.path}: {source.kind.description} does not read the latents of "
                f"{tokenizer.kind.description}, which {tokenizer.path} holds"
            )
    configs = dict(known or {})
    # A model of latents comes first, because it determines more about its tokenizer than the
    # tokenizer's file does, except for the shape of the latents.
    if tokenizer:
        with errors_naming(tokenizer.path):
            held = tokenizer.kind.latent_options(tokenizer.tensors)
            for name, x in held.items():
                if options.get(name) not in (None, x):
                    raise InputError(
                        f"{name}={options[name]}, but its latents have {x}; omit --{name}"
                    )
            options = {**options, **held}
    for part in sorted(sources, key=lambda part: part == "tokenizer"):
        source = sources[part]
        with errors_naming(source.path):
            own = source.kind.own_options(options)
            if part not in configs:
                configs[part] = source.kind.infer(source.tensors, own)
        options = {**options, **source.kind.tokenizer_options(configs[part], own)}
    for source in models:
        if source.kind.check_fit:
            source.kind.check_fit(configs["tokenizer"], configs[source.kind.part])
    return configs


def find_kind(tensors: Tensors, flag: str) -> NameMap:
    """Finds the name map of official tensors; raises InputError if `flag` does not take them."""
    if foreign := [n for n in tensors if n.startswith(HMAR_NAMES)]:
        raise InputError(f"holds {HMAR}, as {foreign[0]} shows; varjax does not support it")
    name_map = next(
        (
            kind
            for kind in kinds().values()
            if {kind.known_by, kind.prefix + kind.known_by} & set(tensors)
        ),
        None,
    )
    if name_map is None:
        known = " nor ".join(kind.description for kind in kinds().values())
        names = " nor ".join(kind.known_by for kind in kinds().values())
        raise InputError(
            f"holds neither {known}: its {len(tensors)} tensors include neither {names}"
        )
    if name_map.flag != flag:
        expected = kinds()[flag].description
        raise InputError(
            f"holds {name_map.description}, not {expected}; give it as --{name_map.flag} instead"
        )
    return name_map
