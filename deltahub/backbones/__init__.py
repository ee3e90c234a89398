"""Backbones: described, found, rebuilt, and the few settings that change with a delta.

A manifest names a backbone by a Hub repository, a commit and a class. The class is looked up
among the public names of a library from ``spec/libraries.toml``; what a manifest or a backbone
names is never imported, and no code of a repository is ever run. Weights are safetensors unless
the caller allows pickle. A caller may also bring the backbone: a folder, another repository, or
the live module itself.

The way of a backbone:

    files = resolve(source)                       # the folder, fetched at its commit; its weight files
    built = build(source, files, settings=...)    # the module, and what its checkpoint did not hold
    require_covered(built, names)                 # those must be in the delta: half a model is an error
    undo = apply_settings(built.model, settings)  # the settings that are read in every forward pass
"""

from __future__ import annotations

__all__ = [
    "DENOISERS",
    "BackboneFiles",
    "Built",
    "Setting",
    "apply_settings",
    "assemble",
    "build",
    "changed_settings",
    "denoiser_of",
    "describe",
    "files_section",
    "origin",
    "pipeline_of",
    "require_covered",
    "resolve",
]

from deltahub.backbones.building import Built, build, require_covered
from deltahub.backbones.files import BackboneFiles, files_section, resolve
from deltahub.backbones.libraries import describe, origin
from deltahub.backbones.pipelines import DENOISERS, assemble, denoiser_of, pipeline_of
from deltahub.backbones.settings import Setting, apply_settings, changed_settings
