"""Tests measurements of this machine's devices."""

import jax
import jax.numpy as jnp

from varjax.runtime import hardware


def test_a_matmul_is_compiled_only_for_its_first_measurement(caplog):
    hardware.matmul_flops(24, jnp.float32, "highest")
    with jax.log_compiles():
        assert hardware.matmul_flops(24, jnp.float32, "highest") > 0
        assert not [record for record in caplog.records if "Compiling" in record.getMessage()]
        hardware.matmul_flops(40, jnp.float32, "highest")
        assert [record for record in caplog.records if "Compiling" in record.getMessage()]
