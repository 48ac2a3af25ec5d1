"""What an operator can set, type or see must be in docs/operating.md, what a founder can set in
docs/manifest.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args

import msgspec
import pytest
from msgspec.inspect import Field, LiteralType, StructType, Type, UnionType, type_info

from xpeer import control, health
from xpeer.cli import all_commands
from xpeer.cli.start import start
from xpeer.config import Home, settings
from xpeer.control import ROUTES
from xpeer.drafting import MEASURED, draft_manifest
from xpeer.errors import ConfigError, ExitCode
from xpeer.forms import Codec
from xpeer.founding_model import InitialModel
from xpeer.manifest import Manifest
from xpeer.manifest.model import Model
from xpeer.manifest.privacy import DELTA_MAX, DELTA_MIN
from xpeer.manifest.round import Round
from xpeer.status import SCHEMA_VERSION
from xpeer.wire import codec

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEXT = (DOCS / "operating.md").read_text()


def rows_of(text: str) -> list[list[str]]:
    """The cells of all table rows."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def headings_of(text: str) -> set[str]:
    """What a link can point to."""
    return {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }


ROWS = rows_of(TEXT)


def row(first: str, rows: list[list[str]] = ROWS, document: str = "operating") -> list[str]:
    """The table row that begins with this cell."""
    found = [cells for cells in rows if cells[0] == first]
    assert len(found) == 1, f"docs/{document}.md needs one row for {first}"
    return found[0]


@pytest.mark.parametrize(
    ("section", "key", "default"), [(s, k, d) for s, k, d in settings()],
    ids=[f"{s}.{k}" for s, k, _ in settings()],
)  # fmt: skip
def test_setting(section: str, key: str, default: Any) -> None:
    _, documented, meaning = row(f"`{section}.{key}`")
    assert msgspec.json.decode(documented.strip("`")) == default
    assert meaning


def test_no_setting_that_is_gone() -> None:
    sections = "|".join({section for section, _, _ in settings()})
    documented = {c[0] for c in ROWS if re.fullmatch(rf"`({sections})\.[a-z_]+`", c[0])}
    assert documented - {"`daemon.log`"} == {f"`{s}.{k}`" for s, k, _ in settings()}


@pytest.mark.parametrize("command", all_commands())
def test_command(command: str) -> None:
    assert row(f"`xpeer {command}`")[1]


@pytest.mark.parametrize("option", [o for p in start.params for o in p.opts if o != "--home"])
def test_flag_of_start(option: str) -> None:
    assert any(option in cells[0] for cells in ROWS)


@pytest.mark.parametrize("code", ExitCode)
def test_exit_code(code: ExitCode) -> None:
    assert row(str(int(code)))[1] == code.name


def test_health() -> None:
    assert health.table() in TEXT, "docs/operating.md: paste what health.table() gives"


def test_file() -> None:
    named = " ".join(cells[0] for cells in ROWS)
    for path in vars(Home(Path("/home"))).values():
        if path != Path("/home"):
            assert path.name in named, path.name


CODE = ("xpeer", "daemon", "bootstrap", "tests", "benchmarks")
MODULES = [
    f"/{path.relative_to(ROOT).as_posix()}" for top in CODE for path in (ROOT / top).rglob("*.py")
]
HISTORY = {"decisions.md"}
"""What names modules as they were."""


def _named(kind: str) -> list[tuple[str, str]]:
    """Each document with what it names, without placeholders such as NAME.py."""
    documents = [
        *sorted(path for path in DOCS.glob("*.md") if path.name not in HISTORY),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
    return [
        (document.relative_to(ROOT).as_posix(), name)
        for document in documents
        for name in sorted(set(re.findall(kind, document.read_text())))
        if not re.search(r"\bNAME\b|_NAME\b", name)
    ]


@pytest.mark.parametrize(("document", "module"), _named(r"`([\w/]+\.py)`"))
def test_modules_exist(document: str, module: str) -> None:
    assert any(path.endswith(f"/{module}") for path in MODULES), f"{document}: {module} is gone"


@pytest.mark.parametrize(
    ("document", "package"), _named(r"`((?:xpeer|daemon|bootstrap)(?:/[a-z_]+)+)`")
)
def test_packages_exist(document: str, package: str) -> None:
    assert (ROOT / package).is_dir(), f"{document}: {package} is gone"


@pytest.mark.parametrize(("document", "target"), _named(r"\]\(([\w./]+)\)"))
def test_linked_files_exist(document: str, target: str) -> None:
    assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target} is gone"


def test_links_inside() -> None:
    assert set(re.findall(r"\(#([^)]+)\)", TEXT)) <= headings_of(TEXT)


CONTROL = TEXT.partition("\n## Control socket\n")[2].partition("\n## ")[0]


def _routes(cell: str) -> list[str]:
    """Of "`POST /v1/pause`, `/v1/stop`": all with their method."""
    method, _, first = cell.strip("`").partition(" ")
    return [f"{method} {path}" for path in first.replace("`", "").split(", ")]


def test_control_socket() -> None:
    answers: dict[str, set[str]] = {}
    documented = []
    for request, answer in rows_of(CONTROL)[2:]:
        routes = _routes(request)
        documented += routes
        for route in routes:
            kind = ROUTES[route.removeprefix("GET /v1/").removeprefix("POST /v1/")].answer
            answers.setdefault(kind.__name__, set()).update(_quoted(answer))
    assert sorted(documented) == sorted(f"{r.method} /v1/{name}" for name, r in ROUTES.items())
    assert answers.pop("Status") == set()  # it is what `xpeer status --json` prints
    assert answers == {name: _fields_of(name) for name in answers}
    problem = next(line for line in CONTROL.splitlines() if line.startswith("409 and 502 carry"))
    assert set(_quoted(problem)) == _fields_of("Problem")
    assert f"`schema_version` ({SCHEMA_VERSION};" in CONTROL


def _quoted(text: str) -> list[str]:
    return re.findall(r'"(\w+)"', text)


def _fields_of(answer: str) -> set[str]:
    """What an answer of the control socket has, beside what all have."""
    return {*getattr(control, answer).__struct_fields__} - {"schema_version"}


class _AnyModel(InitialModel):
    def check(self, tokenizer_vocab: int, sequence_tokens: int) -> None:
        """Fits."""

    def without_frozen(self, section: Model, tokenizer_vocab: int, sequence_tokens: int) -> Model:
        return section

    def public_loss(self, manifest: Manifest, tokenizer: object, device: str) -> None:
        """It has no parameters."""


def _parts(kind: Type) -> tuple[Type, ...]:
    return kind.types if isinstance(kind, UnionType) else (kind,)


def _fields(struct: Type, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Of the manifest: those that are no sections, with their paths."""
    assert isinstance(struct, StructType)
    for field in struct.fields:
        section = next((p for p in _parts(field.type) if isinstance(p, StructType)), None)
        if section is None:
            yield prefix + field.encode_name, field
        else:
            yield from _fields(section, f"{prefix}{field.encode_name}.")


MANIFEST_TEXT = (DOCS / "manifest.md").read_text()
MANIFEST_ROWS = rows_of(MANIFEST_TEXT)
FIELDS = dict(_fields(type_info(Manifest)))
DECIDED = [path for path in FIELDS if "." in path and path.split(".")[0] not in MEASURED]
"""By the founder, with --set or --privacy; `init` fills in the others."""
NARROWER = {"privacy.delta": {DELTA_MIN, DELTA_MAX}}
"""Bounds of fields whose types have wider ones."""


def founded(*changes: str) -> Any:
    """The manifest that `xpeer init` would write, as JSON has it."""
    manifest = draft_manifest(
        "t", _AnyModel(None, {}, 10**6, ""), tokenizer=None, public_text=None, changes=changes
    )
    return msgspec.to_builtins(manifest)


@pytest.mark.parametrize("path", FIELDS)
def test_manifest_field(path: str) -> None:
    meaning = row(f"`{path}`", MANIFEST_ROWS, "manifest")[2]
    assert meaning
    kinds = _parts(FIELDS[path].type)
    for value in (v for kind in kinds if isinstance(kind, LiteralType) for v in kind.values):
        assert f"`{value}`" in meaning
    if path in DECIDED:
        said = {float(n) for n in re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?:e-?\d+)?", meaning)}
        limits = [getattr(kind, end, None) for kind in kinds for end in ("gt", "ge", "lt", "le")]
        assert NARROWER.get(path, {limit for limit in limits if limit is not None}) <= said


@pytest.mark.parametrize("path", [path for path in DECIDED if not FIELDS[path].required])
def test_default_of_manifest(path: str) -> None:
    section, _, key = path.partition(".")
    documented = row(f"`{path}`", MANIFEST_ROWS, "manifest")[1].strip("`")
    named = ["shared_corpus.name=t"] if section == "shared_corpus" else []
    assert founded(*named)[section][key] == msgspec.json.decode(documented)


@pytest.mark.parametrize("path", FIELDS)
def test_set_takes_what_the_founder_decides(path: str) -> None:
    documented = row(f"`{path}`", MANIFEST_ROWS, "manifest")[1].strip("`")
    if path in DECIDED and path != "privacy.mode":
        founded("shared_corpus.name=t", "end.steps=1000", f"{path}={documented}")
    else:
        with pytest.raises(ConfigError, match="--set"):
            founded(f"{path}={documented}")


def test_no_manifest_field_that_is_gone() -> None:
    assert {c[0] for c in MANIFEST_ROWS if c[0].startswith("`")} == {f"`{path}`" for path in FIELDS}


def test_links_of_manifest() -> None:
    for name, heading in re.findall(r"\(([a-z]*)(?:\.md)?#([^)]+)\)", MANIFEST_TEXT):
        assert heading in headings_of((DOCS / f"{name or 'manifest'}.md").read_text()), heading


AGGREGATION_TEXT = (DOCS / "aggregation.md").read_text()


def test_codecs() -> None:
    """Three lists: what a manifest may say, what can be coded, and what is documented."""
    assert sorted(get_args(Codec)) == sorted(codec.NAMES)
    (listed,) = re.findall(r"`round\.codec` is any of ([^.]*)\.", AGGREGATION_TEXT)
    assert sorted(listed.split(", ")) == sorted(codec.NAMES)


def test_rules() -> None:
    """Which there are, which one is the default, and what each puts on the wire."""
    table, _, combiners = AGGREGATION_TEXT.partition("## Combiners")
    rows = rows_of(table)[2:]
    names = [cells[0].partition(" ")[0].strip("`") for cells in rows]
    known = FIELDS["round.rule"].type
    assert isinstance(known, LiteralType)
    assert len(names) == len(set(names))
    assert set(names) == set(known.values)
    assert [cells[0] for cells in rows if "default" in cells[0]] == [f"`{Round().rule}` (default)"]
    for name, cells in zip(names, rows, strict=True):
        values = re.match(r"\d+", cells[3])
        assert values is not None
        assert int(values[0]) == Round(rule=cast(Any, name)).policy.vectors, name
    known = FIELDS["round.combiner"].type
    assert isinstance(known, LiteralType)
    names = [cells[0].partition(" ")[0].strip("`") for cells in rows_of(combiners)[2:]]
    assert set(names) == set(known.values)
    assert len(names) == len(known.values)
