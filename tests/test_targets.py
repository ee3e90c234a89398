"""Patterns, abbreviation and selection, without torch and without a model."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltahub.errors import TargetError
from deltahub.targets import abbreviate, check_path, expand, expand_all, select


class Module:
    pass


class Linear(Module):
    pass


class Conv1D(Module):
    pass


class NonDynamicallyQuantizableLinear(Linear):
    pass


def tiny_bert() -> dict[str, object]:
    paths: dict[str, object] = {"": Module()}
    for i in range(12):
        paths[f"bert.encoder.layer.{i}"] = Module()
        for name in ("query", "key", "value"):
            paths[f"bert.encoder.layer.{i}.attention.self.{name}"] = Linear()
        paths[f"bert.encoder.layer.{i}.attention.output.dense"] = Linear()
        paths[f"bert.encoder.layer.{i}.output.dense"] = NonDynamicallyQuantizableLinear()
        paths[f"bert.encoder.layer.{i}.output.myquery"] = Conv1D()
    paths["bert.pooler"] = Module()
    paths["bert.pooler.dense"] = Linear()
    paths["classifier"] = Linear()
    paths["dense"] = Linear()
    return paths


# ---------------------------------------------------------------------------------------------------------- expand


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a", ["a"]),
        ("a.b-c.d_1", ["a.b-c.d_1"]),
        ("a.{b,c}", ["a.b", "a.c"]),
        ("a.{0..3}", ["a.0", "a.1", "a.2", "a.3"]),
        ("a.{9..11}.x", ["a.9.x", "a.10.x", "a.11.x"]),
        ("é.{0..1,7,x}", ["é.0", "é.1", "é.7", "é.x"]),
        ("l{1..2}.{a,b}", ["l1.a", "l1.b", "l2.a", "l2.b"]),
        ("x{a,b}{0,1}y", ["xa0y", "xa1y", "xb0y", "xb1y"]),
        ("{00,01}", ["00", "01"]),
    ],
)
def test_expands_with_the_last_brace_fastest(pattern: str, paths: list[str]) -> None:
    assert expand(pattern) == paths


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "",
            ".",
            "..",
            ".a",
            "a.",
            "a..b",
            "a b",
            "a/b",
            "a\n",
            "a\0",
            "a\u202eb",
            "a,b",
            "a'b",
            "a.{b",
            "a.b}",
            "a}",
        ),
        *("a.{}", "a.{b}", "a.{b,}", "a.{,b}", "{0..}", "{..3}", "{3..0}", "{3..3}", "{00..3}", "{-1..3}", "{a..c}"),
        *("{{a,b},c}", "{a.b,c}", "{0...3}", "{0..3..1}", "{٠..٣}", "__class__", "a.{b,__dict__}", "a.{_,b}_x"),
        *(
            "a.*",
            "**",
            "a?",
            "[ab]",
            "(a|b)",
            "a|b",
            "^a$",
            "a+",
            "a\\b",
            "(?:a)",
            r"layer\.\d+",
            r".*\.q",
            r"(\w+\.?)+X",
        ),
    ],
)
def test_anything_else_is_a_syntax_error_and_never_a_pattern(pattern: str) -> None:
    with pytest.raises(TargetError) as caught:
        expand(pattern)
    assert caught.value.code == ("E_TARGET_REGEXP" if set(pattern) & set("*?[]()|\\^$+") else "E_TARGET_SYNTAX")


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..999999999}",
        "{0..99999999999999999999}",
        "{0..999}.{0..999}",
        ".".join(["{0..9}"] * 30),
        "{0..9}" * 150_000,
        "a" * 1025,
        "{a," + "b" * 1025 + "}",
        "{a,b}" * 1000,
    ],
)
def test_a_bomb_is_refused_before_it_expands(pattern: str) -> None:
    start = time.process_time()
    with pytest.raises(TargetError) as caught:
        expand(pattern)
    assert caught.value.code == "E_TARGET_EXPANSION"
    assert time.process_time() - start < 3


def test_long_patterns_take_linear_time() -> None:
    start = time.process_time()
    for hostile in ("{" * 500_000, "a" * 1_000_000, "{a," * 300_000, "." * 1_000_000, "{" + "a," * 400_000 + "}"):
        with pytest.raises(TargetError):
            expand(hostile)
    assert time.process_time() - start < 5


def test_the_limit_holds_over_all_patterns() -> None:
    assert len(expand_all(["a.{0..9}", "b.{0..9}"], limit=20)) == 20
    with pytest.raises(TargetError, match="E_TARGET_EXPANSION"):
        expand_all(["a.{0..9}", "b.{0..9}"], limit=19)


def test_a_path_that_comes_twice() -> None:
    for patterns in (["a", "a"], ["a.{0..3}", "a.2"], ["a{b,b}"], ["{a,ab}{bc,c}"]):
        with pytest.raises(TargetError) as caught:
            expand_all(patterns, where="modules[0].targets")
        assert caught.value.code == "E_TARGET_TWICE"
        assert caught.value.where == f"modules[0].targets[{len(patterns) - 1}]"


def test_many_duplicates_in_one_pattern_take_no_quadratic_time() -> None:
    pattern = "{" + ",".join([str(i) for i in range(90_000)] + ["89999"]) + "}"
    start = time.process_time()
    with pytest.raises(TargetError, match="'89999' comes twice"):
        expand(pattern)
    assert time.process_time() - start < 3


def test_every_problem_of_a_list_is_named() -> None:
    with pytest.raises(TargetError) as caught:
        expand_all(["a", "b.*", "a", "c."], where="targets")
    assert caught.value.where == "targets[1]"
    assert [line.split(":")[0] for line in caught.value.also] == [
        "[E_TARGET_TWICE] targets[2]",
        "[E_TARGET_SYNTAX] targets[3]",
    ]


def test_check_path_takes_no_abbreviation() -> None:
    assert check_path("a.b") == "a.b"
    for text in ("a.{b,c}", "a.{0..1}", "a.*", ""):
        with pytest.raises(TargetError, match=r"E_TARGET_SYNTAX|E_TARGET_REGEXP"):
            check_path(text)


# ------------------------------------------------------------------------------------------------------ abbreviate


def test_abbreviates_as_a_person_would() -> None:
    assert abbreviate([p for p in tiny_bert() if ".self.query" in p or ".self.value" in p]) == [
        "bert.encoder.layer.{0..11}.attention.self.{query,value}"
    ]
    assert abbreviate(["a"]) == ["a"]
    assert abbreviate([]) == []
    assert abbreviate(["head", *(f"layer{i}.{j}.conv{k}" for i in range(1, 5) for j in (0, 1) for k in (1, 2))]) == [
        "head",
        "layer{1..4}.{0,1}.{conv1,conv2}",
    ]
    assert abbreviate(["a.10", "a.9", "a.11", "b.0", "b.2"]) == ["a.{9..11}", "b.{0,2}"]
    assert abbreviate(["x.01", "x.02", "x.03"]) == ["x.0{1..3}"]
    assert abbreviate([f"a.{i}" for i in (0, 1, 2, 3, 7, 9, 10, 11)] + ["a.x"]) == ["a.{0..3,7,9..11,x}"]


def test_groups_and_patterns_keep_the_order_given_and_numbers_ascend() -> None:
    assert abbreviate(["m.value", "m.query", "a", "m.2", "m.0"]) == ["m.{0,2,value,query}", "a"]


def test_what_differs_between_layers_stays_apart() -> None:
    paths = [f"l.{i}.{n}" for i in range(12) for n in (("q", "k", "v") if i < 6 else ("q", "v"))]
    found = abbreviate(paths)
    assert found in (["l.{0..5}.{q,k,v}", "l.{6..11}.{q,v}"], ["l.{0..11}.{q,v}", "l.{0..5}.k"])


def test_thousands_of_paths_take_well_under_a_second() -> None:
    linears = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "mlp.up_proj",
        *(f"mlp.experts.{e}.w{k}" for e in range(8) for k in (1, 2, 3)),
    ]
    regular = [f"model.layers.{i}.{name}" for i in range(300) for name in linears]
    rng = random.Random(0)
    wild = list(
        {f"a{rng.randrange(50)}.{rng.randrange(50)}.{rng.choice('abcdef')}.x{rng.randrange(9)}" for _ in range(6000)}
    )
    start = time.process_time()
    assert len(abbreviate(regular)) == 3
    assert sorted(expand_all(abbreviate(wild))) == sorted(wild)
    assert time.process_time() - start < 3


NAMES = st.one_of(
    st.sampled_from(
        ["q", "k", "layer1", "layer2", "layer3", "layer10", "0", "1", "2", "3", "11", "007", "a-b", "_x", "1234567890"]
    ),
    st.from_regex(r"[A-Za-z0-9_-]{1,4}", fullmatch=True).filter(lambda name: not name.startswith("__")),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(NAMES, min_size=1, max_size=4).map(".".join), unique=True, max_size=40))
def test_expand_undoes_abbreviate(paths: list[str]) -> None:
    patterns = abbreviate(paths)
    assert sorted(expand_all(patterns)) == sorted(paths)
    assert len(patterns) <= len(paths)
    assert abbreviate(paths) == patterns


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab0129{},.*[\\é \n", max_size=30))
def test_expand_gives_distinct_paths_or_our_error(pattern: str) -> None:
    try:
        paths = expand(pattern, limit=1000)
    except TargetError:
        return
    assert len(set(paths)) == len(paths) >= 1
    for path in paths:
        check_path(path)


def test_abbreviate_refuses_what_no_pattern_can_hold() -> None:
    with pytest.raises(TargetError, match="E_TARGET_TWICE"):
        abbreviate(["a", "b", "a"])
    with pytest.raises(TargetError, match="E_TARGET_REGEXP"):
        abbreviate(["a.b*"])


# ---------------------------------------------------------------------------------------------------------- select


@pytest.mark.parametrize(
    ("include", "count"),
    [
        ("query", 12),
        ("self.query", 12),
        ("attention.self.query", 12),
        (["query", "value"], 24),
        ("{query,value}", 24),
        ("layer.{0..2}.attention.self.query", 3),
        ("bert.encoder.layer.0.attention.self.query", 1),
        ("attention.*.query", 12),
        ("layer.*.**.dense", 24),
        ("layer.1*.**.query", 3),
        ("**.dense", 26),
        ("dense", 1),
        ("pooler.dense", 1),
        ("qu*", 12),
        ("*ery", 24),
        ("type:Linear", 63),
        ("type:NonDynamicallyQuantizableLinear", 12),
        (f"type:{__name__}.Conv1D", 12),
        (lambda path, module: path.endswith("key") and isinstance(module, Linear), 12),
        (["classifier", "type:Conv1D"], 13),
    ],
)
def test_selects_as_authors_speak(include: object, count: int) -> None:
    modules = tiny_bert()
    found = select(modules, include)  # type: ignore[arg-type]
    assert len(found) == count
    assert found == [path for path in modules if path in set(found)], "the model's order"


def test_the_model_itself_is_no_target() -> None:
    assert "" not in select(tiny_bert(), lambda *_: True)


def test_exclusions_hold_at_boundaries_and_for_everything_inside() -> None:
    modules = tiny_bert()
    assert len(select(modules, "type:Linear", exclude="classifier")) == 62
    assert select(modules, "**.dense", exclude=["pooler", "layer.*"]) == ["dense"]
    assert "bert.pooler.dense" not in select(modules, "**.dense", exclude="pooler")
    assert len(select(modules, ["query", "myquery"], exclude="query")) == 12
    with pytest.raises(TargetError, match="the exclusions leave nothing"):
        select(modules, "query", exclude="self.query")


def test_no_part_of_a_name_ever_matches() -> None:
    assert all(path.endswith(".query") for path in select(tiny_bert(), "query"))
    with pytest.raises(TargetError):
        select(tiny_bert(), "uery")


@pytest.mark.parametrize(
    ("include", "near"),
    [("qurey", "query"), ("self.quary", "self.query"), ("type:linear", "Linear"), ("clasifier", "classifier")],
)
def test_what_matches_nothing_names_its_neighbours(include: str, near: str) -> None:
    with pytest.raises(TargetError) as caught:
        select(tiny_bert(), include)
    assert caught.value.code == "E_TARGET_NOTHING"
    assert near in str(caught.value.found)


def test_every_selector_and_every_exclusion_in_words_must_hit() -> None:
    for include, exclude in ((["query", "nope"], ()), ("query", "nope"), ([], ()), (lambda *_: False, ())):
        with pytest.raises(TargetError, match="E_TARGET_NOTHING"):
            select(tiny_bert(), include, exclude=exclude)  # type: ignore[arg-type]
    assert len(select(tiny_bert(), "query", exclude=lambda *_: False)) == 12


@pytest.mark.parametrize("include", [r"layer\.\d+", "(a|b)", "a**b", "", "a..b", "[qk]uery", "quer?"])
def test_selectors_are_no_regular_expressions(include: str) -> None:
    with pytest.raises(TargetError, match=r"E_TARGET_SYNTAX|E_TARGET_REGEXP"):
        select(tiny_bert(), include)


def test_hostile_globs_take_no_exponential_time() -> None:
    modules: dict[str, object] = {".".join(["a" * 30] * 30): Module()}
    start = time.process_time()
    for pattern in ("*a" * 12 + "*b", ".".join(["**", "a*"] * 12) + ".b"):
        with pytest.raises(TargetError, match="E_TARGET_NOTHING"):
            select(modules, pattern)
    assert time.process_time() - start < 3
