"""The dependencies: all pinned, installed as pinned, none with an advisory. Part of `make check`.

    python -m scripts.audit

Three looks. Everything that taopd and its tools need, and what that needs in turn, has a pin in
constraints.txt and is installed in that version. No pin is below the version that mended an advisory in
scripts/advisories.json, a list kept by hand. And where pip-audit is installed (`pip install pip-audit`) and
reaches its database, it is asked about every pin; the last line says whether that happened, because a list
kept by hand knows nothing of this morning.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from scripts.arguments import Arguments

ROOT = Path(__file__).parents[1]
EXTRAS = ("", "dev")
TIMEOUT_SECONDS = 120


def read_pins(text: str) -> dict[str, Version]:
    """Versions by canonical name; every line but comments is `name==version`."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def needed(package: str = "taopd") -> Iterator[tuple[Requirement, str]]:
    """Every requirement with whose it is, followed through what is installed."""
    queue: list[tuple[str, tuple[str, ...]]] = [(package, EXTRAS)]
    seen = set(queue)
    while queue:
        name, extras = queue.pop()
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in extras):
                continue
            yield requirement, name
            found = (canonicalize_name(requirement.name), ("", *sorted(requirement.extras)))
            if found not in seen and _installed(found[0]) is not None:
                seen.add(found)
                queue.append(found)


def pin_problems(pins: Mapping[str, Version]) -> list[str]:
    """What is needed and has no pin, is not installed, or is installed in another version."""
    problems = []
    for requirement, owner in needed():
        name = canonicalize_name(requirement.name)
        version, pin = _installed(name), pins.get(name)
        if version is None:
            problems.append(f"{name}, which {owner} needs, is not installed")
        elif pin is None:
            problems.append(f"{name}, which {owner} needs, has no pin in constraints.txt")
        elif Version(version.public) != pin:
            problems.append(f"{name} is {version}, and constraints.txt says {pin}")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{name} {version} is not what {owner} needs: {requirement.specifier}")
    return sorted(set(problems))


def advisory_problems(pins: Mapping[str, Version], advisories: list[dict[str, Any]]) -> list[str]:
    """Pins below the version that mended an advisory; one without such a version unless accepted."""
    problems = []
    for entry in advisories:
        pin = pins.get(canonicalize_name(entry["package"]))
        if pin is None or entry.get("accepted"):
            continue
        if entry["fixed"] is None or pin < Version(entry["fixed"]):
            problems.append(f"{entry['package']} {pin}: {entry['id']}, mended in {entry['fixed']}")
    return problems


def database_verdict(
    document: dict[str, Any], advisories: list[dict[str, Any]]
) -> tuple[list[str], int]:
    """pip-audit's JSON as (problems, number of packages that were looked up)."""
    accepted = {entry["id"] for entry in advisories if entry.get("accepted")}
    found = [entry for entry in document["dependencies"] if "vulns" in entry]
    problems = [
        f"{entry['name']} {entry['version']}: {vuln['id']}, mended in {vuln['fix_versions']}"
        for entry in found
        for vuln in entry["vulns"]
        if not accepted & {vuln["id"], *vuln.get("aliases", ())}
    ]
    return problems, len(found)


def ask_database(advisories: list[dict[str, Any]]) -> tuple[list[str], str]:
    """(problems, what was done in words)."""
    tool = shutil.which("pip-audit")
    if tool is None:
        return [], "no advisory database was asked: pip-audit is not installed"
    command = [tool, "--requirement", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip"]
    try:
        done = subprocess.run(
            [*command, "--format", "json", "--progress-spinner", "off"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        problems, count = database_verdict(json.loads(done.stdout), advisories)
    except (subprocess.SubprocessError, ValueError, KeyError) as error:
        return [], f"no advisory database was reached ({type(error).__name__})"
    # A mirror without advisories answers that it knows no package, which is no clean bill.
    if count == 0:
        return [], "no advisory database was reached: it knows none of the packages"
    return problems, f"pip-audit looked up {count} packages"


def _installed(name: str) -> Version | None:
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def main() -> int:
    """Print what was found; 1 if anything is wrong."""
    Arguments(description=(__doc__ or "").splitlines()[0]).parse_args()
    pins = read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    advisories = json.loads((ROOT / "scripts" / "advisories.json").read_text(encoding="utf-8"))
    found, words = ask_database(advisories)
    problems = pin_problems(pins) + advisory_problems(pins, advisories) + found
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    print(
        f"audit: {len(pins)} pins, {len(advisories)} known advisories, {len(problems)} problems; {words}"
    )
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
