"""Is this the declared backbone? Five levels, each with its price, and a report of what was compared."""

from __future__ import annotations

__all__ = ["IdentityReport", "Level", "check"]

import enum
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from deltahub.errors import IdentityError, UsageError, printable
from deltahub.identity.checkpoints import Checkpoint, open_checkpoint
from deltahub.identity.declared import Declared
from deltahub.identity.mismatch import mismatch
from deltahub.identity.modules import module_checkpoint, views
from deltahub.identity.tree import FLOATS, root, structure

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from deltahub.identity.locate import Source

Root = Literal["exact", "bf16", "compatible"]


class Level(enum.IntEnum):
    """How far a backbone is compared; each level above L1 includes the one before it down to L2."""

    L0 = 0
    """Declared: the same repository and commit."""
    L1 = 1
    """Witness: a server reports the declared size and SHA-256 of each file."""
    L2 = 2
    """Structure: the same names, dtypes and shapes."""
    L3 = 3
    """Touched: the tensors that the delta touches are equal."""
    L4 = 4
    """Full: all tensors are equal."""

    @property
    def word(self) -> str:
        """The level as options of functions and of the command line spell it."""
        return ("declared", "witness", "structure", "touched", "full")[self]

    @classmethod
    def named(cls, word: str) -> Level:
        """The level of a word: declared, witness, structure, touched or full; ``E_IDENTITY_LEVEL`` for another."""
        for level in cls:
            if word in (level.word, level.name):
                return level
        raise UsageError(
            "E_IDENTITY_LEVEL",
            "there is no such level of checking",
            expected=", ".join(level.word for level in cls),
            found=word,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class IdentityReport:
    """What was compared, and how it came out; only made when nothing differed.

    Attributes:
        levels: the levels that were reached, lowest first.
        root: whether tensors agreed as stored, after rounding to BF16, or through the producer's list of compatible
            backbones; ``None`` below L2.
        tensors: tensors of the backbone that were looked at by name, dtype and shape.
        hashed: names whose bytes were compared.
        notes: what a reader should know, a sentence each.
    """

    levels: tuple[Level, ...]
    root: Root | None = None
    tensors: int = 0
    hashed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def level(self) -> Level | None:
        """The highest level that was reached."""
        return max(self.levels, default=None)

    def __str__(self) -> str:
        levels = ", ".join(f"{level.name} {level.word}" for level in self.levels) or "nothing"
        how = {
            "exact": "as stored",
            "bf16": "rounded to BF16",
            "compatible": "listed as compatible",
            None: "not compared",
        }
        lines = [f"checked: {levels}; {len(self.hashed)} of {self.tensors} tensors hashed; {how[self.root]}"]
        return "\n".join([*lines, *(printable(note) for note in self.notes)])


def check(
    section: object,
    *,
    files: Source | None = None,
    module: nn.Module | None = None,
    level: Level = Level.L3,
    touched: Iterable[str] | None = None,
    source: Mapping[str, str | None] | None = None,
    witnesses: Mapping[str, tuple[int, str]] | None = None,
    allow_pickle: bool = False,
    cache: bool = True,
) -> IdentityReport:
    """Compare a backbone with what a manifest declares; return what was compared, or raise.

    Args:
        section: the manifest's ``backbone``: a mapping or a pydantic model.
        files: the backbone's folder, file, or files.
        module: the backbone in memory, if there are no files; it is compared under the names that files would have.
        level: how far to go. L3 becomes L4 if the manifest lacks a leaf that is needed.
        touched: names, as in files, that must be compared at L3; by default all that the manifest has leaves of.
        source: ``hub`` and ``commit`` of what is at hand.
        witnesses: path to (size, SHA-256) as a server reports them.
        allow_pickle: whether ``.bin`` files may be opened.
        cache: whether what is found about files may be kept and used again.

    Raises:
        IdentityError: ``E_BACKBONE_MISMATCH``, ``E_BACKBONE_QUANTISED``, ``E_BACKBONE_TIED``, ``E_BACKBONE_COMMIT``,
            ``E_BACKBONE_WITNESS``; whatever makes the section or the weights unreadable.
    """
    declared = Declared.parse(section)
    reached, notes = _outside(declared, level, source, witnesses)
    if level < Level.L2:
        return IdentityReport(levels=reached, notes=notes)
    if (files is None) == (module is None):
        raise UsageError("E_IDENTITY_SOURCE", "a check needs either files or a module")
    wanted = None if touched is None else frozenset(touched)
    if module is None:
        assert files is not None
        found = open_checkpoint(files, allow_pickle=allow_pickle, cache=cache)
        report = _Comparison(declared, found, wanted, strict=True).run(level)
    else:
        report = _in_memory(declared, module, wanted, level)
    return replace(report, levels=reached + report.levels, notes=notes + report.notes)


def _outside(
    declared: Declared,
    level: Level,
    source: Mapping[str, str | None] | None,
    witnesses: Mapping[str, tuple[int, str]] | None,
) -> tuple[tuple[Level, ...], tuple[str, ...]]:
    """L0 and L1, which look at no tensor: errors only if nothing more is asked for, notes otherwise."""
    reached: list[Level] = []
    notes: list[str] = []
    if source is not None and declared.commit is not None:
        if (source.get("hub"), source.get("commit")) == (declared.hub, declared.commit):
            reached.append(Level.L0)
        else:
            error = IdentityError(
                "E_BACKBONE_COMMIT",
                "this is another commit than the declared one",
                expected=f"{declared.hub}@{declared.commit}",
                found=f"{source.get('hub')}@{source.get('commit')}",
                hint="compare the tensors (level touched or full): they may be the same",
            )
            if level == Level.L0:
                raise error
            notes.append(f"another commit: {source.get('hub')}@{source.get('commit')}")
    if witnesses is not None and declared.files:
        differing = [path for path, pair in declared.files.items() if witnesses.get(path) != pair]
        if not differing:
            reached.append(Level.L1)
        elif level == Level.L1:
            raise IdentityError(
                "E_BACKBONE_WITNESS",
                "the server does not report the declared files",
                where=", ".join(differing[:10]),
                hint="compare the tensors (level touched or full): they may be the same in other files",
            )
        else:
            notes.append("the files are not the ones that were declared; their tensors were compared")
    return tuple(reached), tuple(notes)


class _View(Checkpoint):
    """A checkpoint under other names."""

    def __init__(self, base: Checkpoint, names: Mapping[str, str]) -> None:
        super().__init__(base.where, {name: base.specs[old] for name, old in names.items()})
        self._base, self._names = base, names

    def leaves(self, names: Iterable[str], *, bf16: bool = False) -> dict[str, tuple[bytes, bytes]]:
        wanted = list(names)
        found = self._base.leaves([self._names[name] for name in wanted], bf16=bf16)
        return {name: found[self._names[name]] for name in wanted}


def _in_memory(declared: Declared, module: nn.Module, wanted: frozenset[str] | None, level: Level) -> IdentityReport:
    """A module may hold a part of what its files held, or more, under other names: find the view that fits best."""
    found = module_checkpoint(module)
    tries = [_Comparison(declared, _View(found, names), wanted, strict=False) for names in views(module, found.specs)]
    best = next((one for one in tries if one.casts), None)
    if best is None:
        best = next((one for one in tries if declared.leaves.keys() <= one.specs.keys()), tries[0])
    return best.run(level)


class _Comparison:
    """One backbone against one declaration."""

    def __init__(self, declared: Declared, found: Checkpoint, wanted: frozenset[str] | None, *, strict: bool) -> None:
        self.declared = declared
        self.found = found
        self.wanted = wanted
        self.strict = strict  # files must have the declared structure; a module may be a part, if its leaves agree
        self.aliases = {name: kept for name, kept in declared.tied.items() if name in found.specs}
        self.specs = {
            name: spec
            for name, spec in found.specs.items()
            if name not in declared.excluded and name not in self.aliases
        }
        self.casts = self._casts()

    def _casts(self) -> Root | None:
        """How the structure agrees: as it is, or after a cast of all floats to one dtype and back; ``None``: not."""
        if len(self.specs) != self.declared.tensors:
            return None
        if structure(self.specs) == self.declared.structure:
            return "exact"
        floats = {*FLOATS, "BF16"}
        for dtype in floats:
            cast = {name: (dtype if one.dtype in floats else one.dtype, one.shape) for name, one in self.specs.items()}
            if structure(cast) == self.declared.structure:
                return "bf16"
        return None

    def run(self, level: Level) -> IdentityReport:
        """Compare; what is not the declared backbone may still be one that the publisher vouches for."""
        try:
            return self._run(level)
        except IdentityError:
            vouched = self.declared.compatible
            relation = vouched.get(self._root("exact")) if vouched else None
            if relation is None:
                raise
            return self._report((Level.L4,), "compatible", self.specs, f"accepted as compatible: {relation}")

    def _run(self, level: Level) -> IdentityReport:
        declared = self.declared
        needed = declared.leaves.keys() if self.wanted is None else self.wanted
        full = level == Level.L4 or (level == Level.L3 and (not needed or not needed <= declared.leaves.keys()))
        levels: tuple[Level, ...] = (Level.L2,) if self.casts else ()
        if self.casts is None and (self.strict or level == Level.L2 or full) and not self._may_be_mixed(level):
            raise self._differs("its structure is another")
        how: Root = self.casts or "bf16"
        hashed: Iterable[str] = ()
        if level >= Level.L3:
            self._check_ties()
            agreed = self._leaves()
            how = "exact" if agreed and self.casts is None and not self.strict else how
            hashed = declared.leaves
            levels += (Level.L3,) if declared.leaves and needed <= declared.leaves.keys() else ()
            # A declaration without rounded leaves leaves only the root to tell a cast from another backbone.
            full = full or agreed is None or (self.casts is None and self.strict)
        if full:
            how = self.casts or "bf16"
            if self._root(how) != (declared.exact if how == "exact" else declared.bf16):
                raise self._differs("its tensors are others")
            levels, hashed = (*levels, Level.L4), self.specs
        notes = [] if how == "exact" else ["equal after rounding to BF16: the stored dtypes differ"]
        if self.casts is None and not self.strict:
            notes.append("the module is not all of the backbone's files: only the touched tensors were compared")
        return self._report(levels, how, hashed, *notes)

    def _may_be_mixed(self, level: Level) -> bool:
        """Whether only dtypes may differ, some cast and some not, so that the root has to decide."""
        return level > Level.L2 and len(self.specs) == self.declared.tensors

    def _report(self, levels: tuple[Level, ...], how: Root, hashed: Iterable[str], *notes: str) -> IdentityReport:
        return IdentityReport(
            levels=levels, root=how, tensors=len(self.specs), hashed=tuple(sorted(hashed)), notes=notes
        )

    def _root(self, how: Root) -> bytes:
        pairs = self.found.leaves(self.specs, bf16=how == "bf16")
        return root({name: pair[how == "bf16"] for name, pair in pairs.items()})

    def _check_ties(self) -> None:
        """An alias that is there must be its kept tensor; only then may it be left out."""
        for alias, kept in self.aliases.items():
            if kept in self.found.specs:
                pair = self.found.leaves([alias, kept])
                if pair[alias] == pair[kept]:
                    continue
            raise IdentityError(
                "E_BACKBONE_TIED",
                "two tensors are declared to be one and are not",
                where=self.found.where,
                expected=f"{alias} equal to {kept}",
                hint="this backbone was trained or converted with its ties cut",
            )

    def _leaves(self) -> bool | None:
        """Compare the declared leaves: all agree as stored (``True``), after a cast (``False``), or nobody can tell."""
        declared = self.declared.leaves
        missing = sorted(declared.keys() - self.specs.keys())
        if missing:
            raise self._differs("tensors that the delta touches are missing", missing=missing)
        pairs = self.found.leaves(declared)
        unequal = [name for name in declared if pairs[name][0] != declared[name]]
        if not unequal:
            return True
        if self.casts == "exact":
            raise self._differs("tensors that the delta touches are others", differing=unequal)
        rounded = self.found.leaves(unequal, bf16=True)
        differing, unknown = [], False
        for name in unequal:
            answer = self._rounds(name, *rounded[name])
            unknown = unknown or answer is None
            if answer is False:
                differing.append(name)
        if differing:
            raise self._differs("tensors that the delta touches are others", differing=differing)
        return None if unknown else False

    def _rounds(self, name: str, exact: bytes, bf16: bytes) -> bool | None:
        """Whether an unequal leaf is a cast of the declared one; ``None``: the declaration does not allow to tell."""
        if bf16 == self.declared.leaves[name]:
            return True  # declared in BF16, wider here
        theirs = self.declared.leaves_bf16.get(name)
        if self.specs[name].dtype == "BF16" and theirs == exact:
            return True  # declared wider, BF16 here
        # Wider on both sides: the dtypes must be known to differ, or an altered low bit would pass for a cast.
        if self.specs[name].dtype in FLOATS and theirs is not None and (self.casts == "bf16" or self.strict):
            return theirs == bf16
        may_be_cast = (self.strict or self.casts == "bf16") and self.specs[name].dtype in {*FLOATS, "BF16"}
        return None if theirs is None and may_be_cast else False

    def _differs(
        self, what: str, *, missing: list[str] | None = None, differing: list[str] | None = None
    ) -> IdentityError:
        return mismatch(self.declared, self.found, self.specs, what, missing=missing, differing=differing)
