import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from genemodel.errors import ConfigError
from genemodel.settings import (
    MissingSettingError,
    difference,
    nearest,
    parse,
    setting_types,
    to_values,
)


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    kind: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    fused: bool = False

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr must be positive, not {self.lr}; try 1e-3")


@dataclass(frozen=True)
class Integrate:
    kind: Literal["integrate"] = "integrate"
    batch_key: str = "batch"


@dataclass(frozen=True)
class Impute:
    kind: Literal["impute"] = "impute"
    draws: int = 0


type Task = Integrate | Impute


@dataclass(frozen=True)
class Run:
    corpus: Path
    steps: int
    name: str | None = None
    tags: tuple[str, ...] = ()
    optim: Optim = field(default_factory=Optim)
    task: Task = field(default_factory=Integrate)
    weights: dict[str, float] = field(default_factory=dict)
    sources: str | tuple[str, ...] = ()
    workers: int | Literal["auto"] = "auto"


NEEDED: dict[str, object] = {"corpus": "corpora/a", "steps": 10}


def run(**values: object) -> Run:
    return parse(Run, {**NEEDED, **values})


def refusal(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        run(**values)
    return str(caught.value)


def test_every_kind_of_value_arrives_as_its_type() -> None:
    made = run(
        name="x",
        tags=["a", "b"],
        optim={"lr": 1, "kind": "muon", "betas": [0.5, 1], "fused": True},
        task={"kind": "impute", "draws": 3},
        weights={"genes": 2},
        workers=4,
    )
    assert made.corpus == Path("corpora/a")
    assert made.tags == ("a", "b")
    assert made.optim == Optim(1.0, "muon", (0.5, 1.0), True)
    assert type(made.optim.lr) is float
    assert made.task == Impute(draws=3)
    assert made.weights == {"genes": 2.0}
    assert type(made.weights["genes"]) is float
    assert made.workers == 4


def test_defaults_fill_what_was_not_given() -> None:
    assert run() == Run(Path("corpora/a"), 10)


def test_values_round_trip_and_are_plain() -> None:
    made = run(tags=["a"], task={"kind": "impute"}, sources=["p.h5ad"], weights={"a": 0.5})
    values = to_values(made)
    assert values["corpus"] == "corpora/a"
    assert values["optim"]["betas"] == [0.9, 0.95]
    assert parse(Run, values) == made
    assert to_values(parse(Run, values)) == values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"optim": {"lrr": 1}}, "unknown setting 'optim.lrr': did you mean 'optim.lr'?"),
        ({"step": 3}, "unknown setting 'step': did you mean 'steps'?"),
        ({"Optim": {}}, "did you mean 'optim'?"),
        ({"lr": 0.1}, "unknown setting 'lr': did you mean 'optim.lr'?"),
        ({"batch-key": "x"}, "did you mean 'task.batch_key'?"),
        ({"zzz": 1}, "unknown setting 'zzz'; known here: corpus, steps, name"),
        ({"steps": "10"}, "setting 'steps' must be a whole number, not the text '10'"),
        ({"steps": True}, "setting 'steps' must be a whole number, not the true/false value true"),
        ({"steps": 1e6}, "write 1000000"),
        ({"steps": 1.5}, "must be a whole number, not the number 1.5"),
        ({"steps": None}, "setting 'steps' must be a whole number, not null"),
        ({"optim": {"lr": True}}, "'optim.lr' must be a number, not the true/false value true"),
        ({"optim": {"lr": "fast"}}, "'optim.lr' must be a number, not the text 'fast'"),
        ({"optim": {"lr": math.nan}}, "'optim.lr' must be a finite number, not nan"),
        ({"optim": {"lr": math.inf}}, "'optim.lr' must be a finite number, not inf"),
        ({"optim": {"fused": 1}}, "'optim.fused' must be true or false, not the whole number 1"),
        ({"optim": {"kind": "adam"}}, "must be one of adamw, muon, not the text 'adam'"),
        ({"optim": {"kind": "adam"}}, "did you mean 'adamw'?"),
        (
            {"optim": {"betas": [0.9]}},
            "a list of 2 items (a number, a number), not 1 value",
        ),
        ({"optim": {"betas": 0.9}}, "'optim.betas' must be a list of 2 items"),
        ({"optim": {"betas": [0.9, "x"]}}, "'optim.betas[1]' must be a number, not the text 'x'"),
        ({"optim": 3}, "'optim' must be a group of settings (lr, kind, betas, fused)"),
        ({"optim": {"lr": -1}}, "optim: lr must be positive, not -1.0; try 1e-3"),
        ({"tags": 2}, "'tags[0]' must be a text, not the whole number 2"),
        ({"tags": ["a", 2]}, "'tags[1]' must be a text, not the whole number 2"),
        (
            {"name": 7},
            "must be a text or null, not the whole number 7; write it in quotes, '\"7\"'",
        ),
        ({"corpus": ""}, "'corpus' must be a path, not an empty text"),
        ({"corpus": 3}, "'corpus' must be a path, not the whole number 3"),
        ({"task": {"kind": "imputes"}}, "'task.kind' must be one of integrate, impute"),
        ({"task": {"kind": "imputes"}}, "did you mean 'impute'?"),
        ({"task": {"draws": 2}}, "'task.kind' is missing: it must be one of integrate, impute"),
        ({"task": {"kind": "impute", "batch_key": "x"}}, "unknown setting 'task.batch_key'"),
        ({"weights": {"a": "x"}}, "'weights.a' must be a number, not the text 'x'"),
        ({"weights": {3: 1.0}}, "'weights' has the key the whole number 3; keys must be text"),
        ({"weights": [1]}, "'weights' must be a group of settings, not the list [1]"),
        ({"workers": "many"}, "must be a whole number or one of auto, not the text 'many'"),
        ({"workers": 1.5}, "must be a whole number or one of auto, not the number 1.5"),
    ],
)
def test_refusals_say_what_where_and_the_way_out(values: dict[str, object], expected: str) -> None:
    assert expected in refusal(**values)


def test_a_union_takes_each_of_its_members() -> None:
    assert run(sources="a*.h5ad").sources == "a*.h5ad"
    assert run(sources=["a.h5ad"]).sources == ("a.h5ad",)
    assert run(workers="auto").workers == "auto"


def test_one_value_is_a_list_of_one() -> None:
    assert run(tags="a").tags == ("a",)


def test_all_missing_settings_are_named_at_once() -> None:
    with pytest.raises(MissingSettingError, match="'corpus', 'steps' have no default"):
        parse(Run, {"name": "x"})
    with pytest.raises(MissingSettingError, match="'steps' has no default and must be given"):
        parse(Run, {"corpus": "a"})


def test_an_unknown_key_is_told_before_a_missing_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'corpus'"):
        parse(Run, {"corpsu": "a"})


def test_the_place_stands_before_the_key() -> None:
    with pytest.raises(ConfigError, match=r"bundle\.json\.optim\.lr' must be a number"):
        parse(Run, {**NEEDED, "optim": {"lr": "x"}}, where="bundle.json")


def test_a_home_path_is_expanded() -> None:
    assert run(corpus="~/corpora").corpus == Path.home() / "corpora"


def test_difference_names_each_changed_leaf() -> None:
    old, new = to_values(run()), to_values(run(optim={"lr": 0.002}, steps=20, weights={"a": 1.0}))
    assert difference(old, new) == [
        "steps: 10 -> 20",
        "optim.lr: 0.001 -> 0.002",
        "weights.a: (absent) -> 1.0",
    ]
    assert difference(old, old) == []


def test_difference_knows_numbers_from_truth() -> None:
    assert difference({"a": 1, "b": 1, "c": "1"}, {"a": 1.0, "b": True, "c": 1}) == [
        "b: 1 -> true",
        'c: "1" -> 1',
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("BATCH_KEY", "batch_key"),
        ("batch-key", "batch_key"),
        ("bach_key", "batch_key"),
        ("batch", "batch_key"),
        ("xyz", None),
        ("q", None),
    ],
)
def test_nearest(name: str, expected: str | None) -> None:
    assert nearest(name, ["lr", "batch_key", "label_key"]) == expected


def test_a_type_that_is_no_setting_is_our_own_mistake() -> None:
    @dataclass
    class Wrong:
        array: bytes = b""

    with pytest.raises(TypeError, match="not supported"):
        parse(Wrong, {"array": b"x"})
    with pytest.raises(TypeError, match="not a plain value"):
        to_values(Wrong())


def test_setting_types_follow_the_order_of_the_class() -> None:
    assert list(setting_types(Optim)) == ["lr", "kind", "betas", "fused"]
    assert setting_types(Optim)["lr"] is float
