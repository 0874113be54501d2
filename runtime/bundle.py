"""The bundle, the one thing that crosses from the workstation to the device: opened checked, written whole."""

from __future__ import annotations

from svdprune.runtime.bundle_reader import MANIFEST, Bundle, open_bundle, sha256_of
from svdprune.runtime.bundle_writer import BundleWriter, write_bundle

__all__ = ["MANIFEST", "Bundle", "BundleWriter", "open_bundle", "sha256_of", "write_bundle"]
