"""Classifier-free guidance (Ho and Salimans 2022), with one meaning in every family: 1 is off."""

from typing import Any

import jax
import jax.numpy as jnp

from varjax.config.numbers import FLOAT32_MAX, finite_number


def checked_guidance(value: Any) -> float:
    """Returns a guidance scale as a float; raises InputError for a value below 1."""
    allowed = f"a finite number, 1 (off) … {FLOAT32_MAX:g}"
    return finite_number("guidance", value, 1, allowed=allowed)


def guide(x_2B: jax.Array, scale: float | jax.Array) -> jax.Array:
    """Combines predictions c of the class and u of no class to u + scale·(c - u).

    Args:
        x_2B: the predictions c, then the predictions u.
        scale: weight of the class; 1 returns c.
    """
    conditional_B, unconditional_B = jnp.split(x_2B, 2)
    return unconditional_B + scale * (conditional_B - unconditional_B)
