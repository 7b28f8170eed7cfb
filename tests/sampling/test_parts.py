import numpy as np
import pytest

from varjax.errors import InputError
from varjax.sampling.outputs import NpzOutput, parts_folder

LABEL_N = np.arange(10)
PARTS = [range(0, 4), range(4, 8), range(8, 10)]
IMAGES_NHWC = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)


def begun(path, parts=PARTS):
    """Starts an .npz output and adds some of its parts, as a killed command leaves it."""
    output = NpzOutput(path, LABEL_N, seed=3, request={"seed": 3})
    output.begin(write=True)
    for part in parts:
        output.add(part, IMAGES_NHWC[part.start : part.stop])
    return output


def damage(path):
    (file,) = parts_folder(path).glob("000000004.*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 64
    file.write_bytes(content)


@pytest.fixture
def whole(tmp_path):
    begun(tmp_path / "whole.npz").finish()
    return (tmp_path / "whole.npz").read_bytes()


def test_a_damaged_part_is_sampled_again(tmp_path, whole, capsys):
    path = tmp_path / "a.npz"
    begun(path, PARTS[:2])
    damage(path)
    output = begun(path, [])
    assert [output.has(part) for part in PARTS] == [True, False, False]
    assert "000000004.safetensors is deleted and will be made again" in capsys.readouterr().err
    begun(path, PARTS[1:]).finish()
    assert path.read_bytes() == whole


def test_damage_found_while_finishing_stops_the_command_and_a_rerun_repairs_it(tmp_path, whole):
    path = tmp_path / "a.npz"
    output = begun(path)
    damage(path)
    with pytest.raises(InputError, match="1 parts of .*a.npz were damaged .* run the same command"):
        output.finish()
    assert not path.exists()
    assert [begun(path, []).has(part) for part in PARTS] == [True, False, True]
    begun(path, PARTS[1:2]).finish()
    assert path.read_bytes() == whole
