"""The versions of other libraries that our hooks were tested with."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# First and last minor release that `make test-compat` runs. The hooks replace names that no release promises to keep.
TESTED = {"transformers": ("5.17", "5.23"), "peft": ("0.19", "0.21"), "trl": ("1.15", "1.16")}


def installed(allow_untested: bool = False) -> dict[str, str]:
    """The installed ones among the libraries in `TESTED`, with their versions.

    Raises `ValueError` for a version outside the tested range, unless `allow_untested`.
    """
    found = {}
    for library, (first, last) in TESTED.items():
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
        minor = Version(found[library]).release[:2]
        if not (Version(first).release <= minor <= Version(last).release or allow_untested):
            tested = f"{first}.*" if first == last else f"{first}.* to {last}.*"
            raise ValueError(
                f"posttrain's hooks are tested with {library} {tested}, and {found[library]} is installed; "
                "allow_untested=True tries it all the same"
            )
    return found
