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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_sites_are_those_that_a_reader_sees(case):
    assert seen(sites_of(case.name)) == dict(case.sites)


@pytest.mark.parametrize(
    "name, path, stacks",
    [
        ("tied", "layers/up", ("layers",)),
        ("nested_scans", "inner", ("layers", "layers")),
        ("scanned_experts", "w", ("layers", "batch")),
        ("scanned_mixture", "up", ("layers", "experts")),
        ("conv_scanned", "w", ("layers", "groups")),
        ("dot_general_batches", "w", ("batch", "batch")),
    ],
)
def test_stack_axes_say_where_they_come_from(name, path, stacks):
    assert sites_of(name)[path].stacks == stacks


@pytest.mark.parametrize(
    "name, path, count",
    [("mlp", "up", 1), ("used_twice", "w", 3), ("two_kinds", "table", 3)],
)
def test_uses_are_counted_by_places_in_the_model(name, path, count):
    assert sites_of(name)[path].count == count


def test_a_stack_is_found_wherever_a_loop_gets_its_layer():
    """By index, by a slice of the stack, stacked on the way: layers are layers."""
    assert sites_of("indexed_layers")["a"].stack == (3,)
    assert sites_of("part_of_a_stack")["w"].stack == (4,)
    assert sites_of("stacked_on_the_way")["1/w"].stack == ()


def test_a_kernel_that_the_model_cuts_has_a_site_for_each_part():
    paths = [path for path in sites_of("split_kernel") if path.startswith("qkv")]
    assert paths == ["qkv/0:3", "qkv/3:6", "qkv/6:12"]


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
        w = params["w"]
        halves = w.reshape(4, 2, 3).transpose(1, 0, 2).reshape(2, 12)
        return x @ w, x[:, :2] @ halves

    with pytest.raises(lj.InputError, match="read as two different matrices"):
        lj.find_sites(apply, {"w": jnp.ones((4, 6))}, jnp.ones((3, 4)))


def test_the_table_says_what_adapts_each_site():
    rules = {"up|down": lj.lora(rank=2), ".*": lj.lora(rank=3)}
    head, _, *rows = sites_of("mlp").table(rules).splitlines()
    assert head.split("  ")[0] == "path" and head.endswith("adapted by")
    up = next(row for row in rows if row.startswith("up"))
    assert "5 x 7" in up and "35" in up
    assert "lora(rank=2" in up and "rank=3" not in up


def test_the_table_of_a_mixture_shows_experts_and_leaves_the_router_out():
    lines = sites_of("mixture").table({lj.all_linear: lj.lora(rank=2)}).splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert "4 experts" in rows["experts/up"] and "lora(rank=2" in rows["experts/up"]
    assert rows["router"].endswith("-")
