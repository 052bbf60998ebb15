"""Statistics of outliers against numbers worked out on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.analysis.activations import activation_statistics
from fbi.quant.select import kth_largest


def test_a_single_outlier():
    # 3999 zeros and one 8: mean 0.002, energy all in the one; k = 4 takes three zeros with it
    x = jnp.zeros(4000).at[7].set(-8.0)
    found = activation_statistics(x)
    n, mean = 4000, -8 / 4000
    fourth = ((8 + mean) ** 4 + (n - 1) * mean**4) / n
    second = ((8 + mean) ** 2 + (n - 1) * mean**2) / n
    assert float(found["kurtosis"]) == pytest.approx(fourth / second**2, rel=1e-4)
    assert float(found["rms"]) == pytest.approx(8 / n**0.5)
    assert float(found["peak"]) == pytest.approx(n**0.5)
    assert float(found["top_energy"]) == pytest.approx(1.0)


def test_ties_at_the_border_are_counted_as_often_as_they_fit():
    # 3000 entries: the top three of 5, 2, 2, 2, 2 and ones hold 25 + 4 + 4
    x = jnp.ones((30, 100)).at[0, :5].set(jnp.array([5.0, -2.0, 2.0, -2.0, 2.0]))
    assert float(activation_statistics(x)["top_energy"]) == pytest.approx(33 / (25 + 16 + 2995))


def test_two_values_have_the_least_kurtosis():
    found = activation_statistics(jnp.array([[1.0, -1.0], [-1.0, 1.0]], jnp.bfloat16))
    assert {name: float(value) for name, value in found.items()} == {
        "kurtosis": 1,
        "peak": 1,
        "top_energy": 0.25,
        "rms": 1,
    }


def test_a_gaussian():
    found = activation_statistics(jax.random.normal(jax.random.key(0), (1000, 1000)))
    assert float(found["kurtosis"]) == pytest.approx(3.0, abs=0.02)
    # the energy of |x| > z with P(|x| > z) = 0.001, z = 3.2905: 0.001 + 2 z phi(z)
    z = 3.290527
    assert float(found["top_energy"]) == pytest.approx(
        0.001 + 2 * z * np.exp(-z * z / 2) / np.sqrt(2 * np.pi), rel=0.02
    )


@pytest.mark.parametrize("k", [1, 2, 17, 64])
def test_the_kth_largest_is_that_of_sorting_also_when_sharded(k):
    x = jnp.abs(jax.random.normal(jax.random.key(1), (8, 8))) * jnp.float32(1e-20)
    expected = np.sort(np.asarray(x).ravel())[-k]
    assert float(kth_largest(x, k)) == expected
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"))):
        placed = jax.device_put(x, jax.P("data", "model"))
        assert float(jax.jit(kth_largest, static_argnums=1)(placed, k)) == expected


def test_a_stack_of_sharded_activations_gives_what_each_gives_alone():
    x = jax.random.normal(jax.random.key(2), (3, 8, 8))
    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"))):
        placed = jax.device_put(x, jax.P(None, "data", "model"))
        together = jax.device_get(jax.jit(jax.vmap(activation_statistics))(placed))
    for i in range(3):
        for name, value in activation_statistics(x[i]).items():
            np.testing.assert_allclose(together[name][i], float(value), rtol=1e-5)
