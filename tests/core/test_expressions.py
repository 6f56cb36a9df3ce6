"""Regular expressions of others: what `re` says of them, in bounded time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_kernels.core import expressions
from dora_kernels.core.expressions import Expression, Steps
from dora_kernels.core.patterns import ByName

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "model.visual.blocks.3.attn.qkv",
         "lm_head",
         "model.language_model.layers.7.self_attn.o_proj", "unet.down_blocks.0.attentions.1.to_q", "", "q_proj",
         "model.layers.0.self_attn.q_proj_other", "layers.x.q"]  # fmt: skip

# of the kinds that PEFT's and other programs' configurations have
USUAL = [
    r".*\.(q_proj|k_proj|v_proj|o_proj)$",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"^(?!.*visual).*(?:q_proj|k_proj|qkv|down_proj).*",
    r"model\.layers\.\d+\.(self_attn|mlp)\.(?:[qkvo]|gate|up|down)_proj",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|o_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|down_proj)))",
    r"(?<=x)\.q|.*(?<!other)", r".*layers\.(?:[0-9]|1[01])\..*", r"[^.]*", r"\w+\b\.?.*", r"(?P<all>.*)\.to_q",
    r"lm_head|model\.visual\.blocks\.3\.attn\.qkv", r".*\Z", r"\D*\d\D*", r".{3,30}", r".+?",
]  # fmt: skip


def same(pattern, text):
    steps = Steps("label")
    expression = Expression(pattern, steps)
    assert expression.fullmatch(text) == bool(re.fullmatch(pattern, text)), (pattern, text)
    assert bool(expression.ends(text, {0})) == bool(re.match(pattern, text)), (pattern, text)


@pytest.mark.parametrize("pattern", USUAL)
def test_the_usual_ones(pattern):
    for name in NAMES:
        same(pattern, name)


pieces = st.recursive(
    st.sampled_from(["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a.]", "[0-9_]", "^", "$", r"\b", "", "ab", r"\S"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{0,2}", "{1,3}?", "{2,}"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"),
        inner.map(lambda part: f"(?={part})"),
        inner.map(lambda part: f"(?!{part})"),
        st.sampled_from(["(?<=a)", "(?<!b)", "(?<=[ab.])", "(?<!ab)"]),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=1500)
@given(pieces, st.text("ab.1_\n", max_size=7))
def test_the_same_as_re(pattern, text):
    same(pattern, text)


REFUSED = [r"(a)\1", r"(?i)a", r"(?:a)(?(1)b)", r"(?P<x>a)(?P=x)", r"(?i:a)", "(", "*", "a{2,1}", "[", r"\q",
           "(" * 5000 + ")" * 5000, r"(?<=a*)b"]  # fmt: skip


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_is_refused(pattern):
    with pytest.raises(ValueError):
        Expression(pattern, Steps("label"))
    with pytest.raises(ValueError, match="rank_pattern: .* is not a regular expression: "):
        ByName({pattern: 1}, "rank_pattern")


ENDLESS = [r"(a+)+$", r"(a|a)*b", r"(.*)*x", ".*" * 30 + "x", r"((a{1,60}){1,60}){1,60}b", "(a|aa)+$",
           "(" * 20 + "a" + "*)" * 20 + "b", r"(?=(?=(?=.*x).*x).*x).*x", "(a?){1000}b",
           r"(?:a*){1000000000}b"]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pattern", ENDLESS)
def test_none_runs_for_ever(pattern):
    """`re` would take 2^60 or 1000^30 steps; here either an answer or the limit."""
    expression = Expression(pattern, steps := Steps("rank_pattern"))
    try:
        assert not expression.fullmatch("a" * 999 + "c")
    except ValueError as error:
        assert re.fullmatch("rank_pattern: to match the regular expressions takes more than .* steps", str(error))
    assert steps._left < expressions.STEPS


def test_the_steps_are_those_of_all_together(monkeypatch):
    monkeypatch.setattr(expressions, "STEPS", 2000)
    values = ByName({f".*{i}x": i for i in range(100)}, "alpha_pattern")
    with pytest.raises(ValueError, match="alpha_pattern: to match the regular expressions takes more than 2000 steps"):
        for i in range(100):
            values.get(f"layer.{i}", None)


def test_many_names_take_no_steps(monkeypatch):
    """As written for each layer of another rank: looked up, so that many layers take no more than few."""
    monkeypatch.setattr(expressions, "STEPS", 0)
    names = [f"model.layers.{i}.q_proj" for i in range(2000)]
    values = ByName({f"^{re.escape(name)}": i for i, name in enumerate(names)}, "rank_pattern")
    assert [values.get(name, None) for name in names] == list(range(2000))
    assert values.get(f"other.{names[0]}", None) is None
    assert ByName({"q_proj": 1, "layers.0.q_proj": 2}, "rank_pattern")


@settings(max_examples=300)
@given(st.lists(st.one_of(pieces, st.sampled_from(["a", "b.a", "^a", r"b\.a", "^b.a"])), max_size=4, unique=True),
       st.text("ab.", max_size=6))  # fmt: skip
def test_values_by_name_as_in_peft(keys, name):
    """The first key that matches the end of a name, from a dot on."""
    wanted = next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), None)
    values = ByName({key: key for key in keys}, "rank_pattern")
    assert values.get(name, None) == wanted
    missed = values.unmatched([name])
    assert all((repr(key) in "".join(missed)) for key in keys if not re.match(rf"(.*\.)?({key})$", name))
