import jax
import jax.numpy as jnp
import pytest
from cases import CASES

import lora_jax as lj

BY_NAME = {case.name: case for case in CASES}


def sites_of(name):
    apply, params, inputs = BY_NAME[name].build(jax.random.key(0))
    return lj.find_sites(apply, params, *inputs)


def seen(sites):
    return {path: (site.d_in, site.d_out, site.stack, site.uses) for path, site in sites.items()}


def test_attention_kernels_of_three_axes():
    assert seen(sites_of("heads")) == {
        "q": (6, 12, (), ("dense",)),
        "k": (6, 12, (), ("dense",)),
        "v": (6, 20, (), ("dense",)),
        "out": (20, 7, (), ("dense",)),
    }


def test_a_kernel_stored_output_first_is_read_input_first():
    assert seen(sites_of("transposed_kernel")) == {
        "0": (5, 7, (), ("dense",)),
        "1": (7, 3, (), ("dense",)),
    }


def test_a_tied_embedding_is_one_site_of_two_uses_and_layers_are_stacks():
    assert seen(sites_of("tied_remat")) == {
        "embed/embedding": (11, 6, (), ("lookup", "dense, transposed")),
        "layers/up": (6, 8, (3,), ("dense",)),
        "layers/down": (8, 6, (3,), ("dense",)),
    }


def test_experts_are_stacks_inside_stacks():
    assert seen(sites_of("scanned_experts"))["w"] == (5, 7, (3, 4), ("dense",))


def test_flax_modules_of_both_kinds():
    nnx_sites = seen(sites_of("nnx_stack_remat"))
    assert nnx_sites["blocks/attend/query/kernel"] == (6, 8, (3,), ("dense",))
    assert nnx_sites["blocks/attend/out/kernel"] == (8, 6, (3,), ("dense",))
    assert nnx_sites["embed/embedding"][3] == ("lookup", "dense, transposed")
    linen = seen(sites_of("linen_stack"))
    kernels = {path.split("/")[-2] for path in linen if path.endswith("kernel")}
    assert kernels == {"Dense_0", "DenseGeneral_0", "query", "key", "value", "out", "Einsum_0"}
    assert linen["params/Einsum_0/kernel"] == (6, 10, (), ("dense",))


def test_what_is_no_kernel_is_listed_with_its_operations():
    sites = sites_of("mlp")
    assert "bias" not in sites
    assert sites.others == {"bias": ("broadcast_in_dim",)} or "add" in sites.others["bias"]


def test_shapes_are_enough_and_flags_pass_through():
    def apply(params, x, *, double):
        y = x @ params["w"]
        return y * 2 if double else y

    shape = jax.ShapeDtypeStruct
    params = {"w": shape((3, 5), jnp.float32), "steps": shape((), jnp.int32), "name": "linear"}
    sites = lj.find_sites(apply, params, shape((2, 3), jnp.float32), double=True)
    assert list(sites) == ["w"]


def test_one_parameter_read_as_two_matrices_is_refused():
    def apply(params, x):
        return x @ params["w"].reshape(4, 6), x @ params["w"].reshape(2, 2, 6)[0].T @ x.T

    with pytest.raises(lj.InputError, match="read as two different matrices"):
        lj.find_sites(
            lambda p, x: (
                x @ p["w"],
                x[:, :2] @ p["w"].reshape(4, 2, 3).transpose(1, 0, 2).reshape(2, 12),
            ),
            {"w": jnp.ones((4, 6))},
            jnp.ones((3, 4)),
        )


def test_the_table_can_say_what_adapts_each_site():
    sites = sites_of("mlp")
    table = sites.table({"up": "lora(rank=2)"})
    assert table.splitlines()[0].endswith("adapted by")
    assert "up    dense  5 x 7     -      35          lora(rank=2)" in table
