"""scikit-build-core as it is, but an editable install puts no folder on sys.path.

Its redirecting finder already resolves `posttrain` and everything below. The folders that it lists beside it, for
static tools, would be the repository, where `kernels/` would then import as a top-level package, and, since `kernels/`
is mapped to posttrain/kernels, even the folder that the repository lies in.
"""

import base64
import hashlib
import zipfile
from pathlib import Path

from scikit_build_core.build import build_editable as _build_editable
from scikit_build_core.build import (  # noqa: F401  the hooks that stay
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """The PEP 660 hook."""
    name = _build_editable(wheel_directory, config_settings, metadata_directory)
    wheel = Path(wheel_directory) / name
    with zipfile.ZipFile(wheel) as archive:
        files = {info: archive.read(info) for info in archive.infolist()}
    replaced = {}
    for info, content in files.items():
        if info.filename.endswith(".pth"):
            imports = [line for line in content.splitlines(keepends=True) if line.startswith(b"import ")]
            files[info] = replaced[info.filename] = b"".join(imports)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in files.items():
            record = info.filename.endswith(".dist-info/RECORD")
            archive.writestr(info, _with_new_hashes(content, replaced) if record else content)
    return name


def _with_new_hashes(record: bytes, replaced: dict[str, bytes]) -> bytes:
    lines = []
    for line in record.decode().splitlines():
        path = line.split(",")[0]
        if path in replaced:
            digest = base64.urlsafe_b64encode(hashlib.sha256(replaced[path]).digest()).rstrip(b"=").decode()
            line = f"{path},sha256={digest},{len(replaced[path])}"
        lines.append(line)
    return "".join(line + "\n" for line in lines).encode()
