"""Running an export: checked before it is opened, on a provider that works, with deltas chosen per run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltahub.converters.onnx import generation
from deltahub.converters.onnx.external import check_digest, check_graph, read_graph
from deltahub.converters.onnx.providers import PROVIDERS, Choice, choose, open_session
from deltahub.converters.onnx.slots import Slot, check_delta, check_order, together
from deltahub.converters.onnx.swapping import DELTAS, read_report, slots_in
from deltahub.errors import ConverterError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["Session", "check_files"]

_TYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16), "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32), "tensor(bool)": np.dtype(np.bool_), "tensor(double)": np.dtype(np.float64),
}  # fmt: skip


class Session:
    """An export, open.

    Deltas of a swappable export are inputs of each run, never ONNX Runtime's own adapters: those are ignored where
    inputs are bound, and of two that share a name the first wins without a word.

    Args:
        folder: what ``export_onnx`` wrote.
        provider: ``auto``, ``cuda``, ``tensorrt``, ``directml``, ``coreml`` or ``cpu``.
        strict: refuse where the provider asked for does not work; else fall back to the CPU, which :attr:`choice` says.
        file: the graph; the only one, or the decoder, by default.
        threads: of the CPU.
        verify: compare the files with the digests of the export.
        options: provider options, such as ``{"device_id": 1}``, or ``{"enable_cuda_graph": 1}`` for a graph whose
            inputs keep their sizes.

    Attributes:
        folder: the export.
        report: its ``export.json``.
        choice: which provider it runs on, and why.
        inputs: the graph's inputs without slots: name to type and axes.
        outputs: names of its outputs.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        provider: str = "auto",
        strict: bool = True,
        file: str | None = None,
        threads: int | None = None,
        verify: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.report = read_report(self.folder)
        self.file = file or _main(self.report, self.folder)
        check_files(self.folder, self.file, self.report, verify=verify)
        self.choice: Choice = choose(provider, strict=strict)
        chain: list[Any] = list(self.choice.chain)
        if options:
            chain[0] = (chain[0], dict(options))
        self._session = open_session(self.folder / self.file, chain, threads=threads)
        running = self._session.get_providers()[0]
        if running != PROVIDERS[self.choice.provider]:
            raise ConverterError("E_ONNX_PROVIDER", "the graph does not run where it should",
                                 expected=self.choice.provider, found=running)  # fmt: skip
        self._device = "cuda" if self.choice.provider in {"cuda", "tensorrt"} else "cpu"
        self._number = int((options or {}).get("device_id", 0)) if self._device == "cuda" else 0
        self._slots: dict[str, Slot] = {k: v for k, v in slots_in(self.report, self.folder).items() if v.used}
        self.inputs = {
            one.name: (one.type, tuple(one.shape)) for one in self._session.get_inputs() if one.name not in self._slots
        }
        self.outputs = tuple(one.name for one in self._session.get_outputs())
        self._defaults = {one.name for one in self._session.get_overridable_initializers()}
        self._known = self._defaults | {one.name for one in self._session.get_inputs()}
        self._loaded: dict[str, dict[str, NDArray[Any]]] = {}
        self._active: dict[str, Any] = {}
        self._names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Session {str(self.folder / self.file)!r} on {self.choice.provider}>"

    # --- deltas
    @property
    def deltas(self) -> tuple[str, ...]:
        """Deltas that can be put into the graph."""
        found = {path.stem for path in (self.folder / DELTAS).glob("*.safetensors")} if self._slots else set()
        return tuple(sorted(found | self._loaded.keys()))

    @property
    def active(self) -> tuple[str, ...]:
        """Deltas that the next run uses."""
        return self._names

    def use(self, *names: str) -> Session:
        """Choose the deltas of the following runs; none for no name. Several act together: their effects add up.

        Raises:
            ConverterError: ``E_ONNX_DELTA`` for an unknown one, ``E_ONNX_SLOT`` for a file that does not fit or deltas
                that do not add up.
        """
        chosen = [self._values(name) for name in dict.fromkeys(names)]
        if len(chosen) > 1:
            check_order(self._slots, chosen, names)
        self._active = chosen[0] if len(chosen) == 1 else together(self._slots, chosen)
        self._names = tuple(dict.fromkeys(names))
        return self

    def _values(self, name: str) -> dict[str, NDArray[Any]]:
        found = self._loaded.get(name)
        if found is None:
            if name not in self.deltas:
                raise ConverterError("E_ONNX_DELTA", "there is no such delta beside this graph", where=self.folder,
                                     expected=", ".join(self.deltas) or "it has no slots", found=name)  # fmt: skip
            found = self._loaded[name] = self._read(self.folder / DELTAS / f"{name}.safetensors")
        return found

    def _read(self, path: Path) -> dict[str, NDArray[Any]]:
        from deltahub.tensors import TensorFile

        values: dict[str, NDArray[Any]] = {}
        with TensorFile.read(path) as file:
            for name, info in file.items():
                slot = self._slots.get(name)
                if slot is None or not slot.fits(info.shape, info.dtype):
                    raise ConverterError("E_ONNX_SLOT", "a tensor of this file has no slot in the graph", where=path,
                                         expected=None if slot is None else [slot.dtype, *slot.shape],
                                         found=f"{name} {info.dtype} {list(info.shape)}")  # fmt: skip
                values[name] = file.torch(name).numpy().copy()
        check_delta(self._slots, {name: value.shape for name, value in values.items()}, path)
        return values

    # --- running
    def run(
        self,
        inputs: Mapping[str, ArrayLike],
        *,
        deltas: Sequence[str] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run the graph once.

        Args:
            inputs: by name; arrays, tensors or lists. A missing ``attention_mask``, ``token_type_ids`` or
                ``position_ids`` gets its usual value, a missing past is empty.
            deltas: which deltas act in this run; by default those of :meth:`use`.
            outputs: names of what is asked for; all by default.

        Raises:
            ConverterError: ``E_ONNX_INPUT`` for an input that is missing, unknown, or of another shape or type.
        """
        if deltas is not None:
            before = self._active, self._names
            try:
                return self.use(*deltas).run(inputs, outputs=outputs)
            finally:
                self._active, self._names = before
        feeds = self._feeds(inputs)
        names = list(outputs or self.outputs)
        unknown = set(names) - set(self.outputs)
        if unknown:
            raise ConverterError("E_ONNX_INPUT", "the graph has no such output", expected=", ".join(self.outputs),
                                 found=", ".join(sorted(unknown)))  # fmt: skip
        try:
            found = self._session.run(names, {**feeds, **self.feeds_of_deltas})
        except Exception as error:
            raise ConverterError("E_ONNX_RUNTIME", f"ONNX Runtime cannot run this: {error}", where=self.file) from error
        return dict(zip(names, found, strict=True))

    def run_held(
        self, inputs: Mapping[str, ArrayLike], held: Mapping[str, Any], keep: Sequence[str]
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Run the graph once with inputs that lie on the device already, and leave outputs there.

        Args:
            inputs: by name, as for :meth:`run`.
            held: what an earlier run left, by the names of inputs.
            keep: names of outputs that stay on the device.

        Returns:
            The other outputs as arrays, and those that stay as values of ONNX Runtime, by name.

        Raises:
            ConverterError: as :meth:`run`.
        """
        import onnxruntime

        binding = self._session.io_binding()
        for name, array in {**self._feeds(inputs, held), **self.feeds_of_deltas}.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, self._device if name in keep else "cpu", self._number if name in keep else 0)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise ConverterError("E_ONNX_RUNTIME", f"ONNX Runtime cannot run this: {error}", where=self.file) from error
        values = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        arrays = {name: value.numpy() for name, value in values.items() if name not in keep}
        return arrays, {name: values[name] for name in keep}

    def _feeds(self, inputs: Mapping[str, ArrayLike], held: Mapping[str, Any] | None = None) -> dict[str, NDArray[Any]]:
        unknown = [name for name in inputs if name not in self.inputs]
        if unknown:
            raise ConverterError("E_ONNX_INPUT", "the graph has no such input", found=", ".join(unknown),
                                 expected=", ".join(self.inputs))  # fmt: skip
        wanted = {name: said for name, said in self.inputs.items() if name not in (held or {})}
        given = {**inputs, **generation.usual(wanted, inputs)}
        missing = [name for name in wanted if name not in given and name not in self._defaults]
        if missing:
            raise ConverterError("E_ONNX_INPUT", "the graph needs another input", expected=", ".join(missing))
        feeds: dict[str, NDArray[Any]] = {}
        axes: dict[str, tuple[int, str]] = {}
        for name, value in given.items():
            kind, dims = self.inputs[name]
            array: NDArray[Any] = np.ascontiguousarray(value)
            array = array.astype(_TYPES.get(kind, array.dtype), copy=False)
            _check_shape(name, array, dims, axes)
            feeds[name] = array
        return feeds

    def generate(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, **options: Any
    ) -> NDArray[np.int64]:
        """Greedy generation with the cache of keys and values; see :func:`generation.generate` for the options."""
        return generation.generate(self, input_ids, attention_mask, **options)

    @property
    def session(self) -> Any:
        """ONNX Runtime's own session."""
        return self._session

    @property
    def feeds_of_deltas(self) -> Mapping[str, Any]:
        """What the active deltas add to the inputs of a run of this graph."""
        return {name: value for name, value in self._active.items() if name in self._known}


def _check_shape(name: str, array: NDArray[Any], dims: Sequence[Any], axes: dict[str, tuple[int, str]]) -> None:
    """An axis of a name has one size in all inputs; ONNX Runtime would broadcast, or fail deep inside the graph."""
    wrong = len(dims) != array.ndim
    for dim, size in zip(dims, array.shape, strict=False):
        if isinstance(dim, int):
            wrong |= dim != size
        elif dim is not None:
            known, first = axes.setdefault(dim, (size, name))
            if known != size:
                raise ConverterError("E_ONNX_INPUT", f"the axis {dim} has two sizes", where=f"{first}, {name}",
                                     expected=known, found=size)  # fmt: skip
    if wrong:
        raise ConverterError("E_ONNX_INPUT", "the input has another shape than the graph takes", where=name,
                             expected=list(dims), found=list(array.shape))  # fmt: skip


def _main(report: Mapping[str, Any], folder: Path) -> str:
    files = [str(one.get("file", "")) for one in report.get("graphs", ())]
    if len(files) == 1:
        return files[0]
    raise ConverterError("E_ONNX_FILE", "the export has several graphs: name one", where=folder,
                         expected=", ".join(files))  # fmt: skip


def check_files(folder: Path, file: str, report: Mapping[str, Any], *, verify: bool) -> None:
    """Everything that can be known of the files, before ONNX Runtime opens one of them."""
    listed = report["files"]
    if "/" in file or "\\" in file or file not in listed:
        raise ConverterError("E_ONNX_FILE", "the export has no such graph", where=folder, found=file,
                             expected=", ".join(_files(listed)))  # fmt: skip
    data = check_graph(folder / file, read_graph(folder / file))
    if verify:
        for name in (file, *sorted(data)):
            check_digest(folder / name, listed.get(name))


def _files(listed: Mapping[str, Any]) -> Iterator[str]:
    return (name for name in listed if name.endswith(".onnx"))
