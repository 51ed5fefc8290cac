"""Keys of inputs and labels: file names made of foreign names, no two the same.

    a/b                   the picture a/b.jpg
    a/b~0123456789ab      another one that wishes for the same key; the digits are of its URI
    ~0123456789ab         one whose name cannot be a key
    shard~/KEY            the sample KEY of shard.tar
    shard~2/KEY           the second sample of this name
    shard~bad/0123...     a sample whose name cannot be a key
    shard~rest            what comes after a shard is cut short

``~`` is ours: in the name of a picture or shard it becomes ``_``, as a dot does. So nothing in a store, whatever its
name, can have the key of something else; a sample's own name comes last, and what stands before it is free of ``~/``.
"""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath

from afa_core.data.sample import BadSample, check_key, path_to_key

OWN = "~"
MAX_INPUT_KEY = 480  # leaves room for what makes it unique, below the 512 that a key may have


def wished_key(path: PurePosixPath) -> str:
    """Key that a path wishes for; empty where it names nothing."""
    return foreign_key(path_to_key(path)) if path.name else ""


def foreign_key(name: str) -> str:
    """A key that somebody else has thought of."""
    return name.replace(OWN, "_").encode("utf-8", "replace").decode()


def input_key(wish: str, uri: str) -> str:
    """The key wished for, or one made of the URI where that cannot become a file name."""
    return f"{OWN}{digest(wish, uri)}" if key_problem(wish) else wish


def key_problem(wish: str) -> str:
    """Reason code of a key that cannot become a file name; empty for one that can."""
    try:
        return "bad_key" if len(check_key(wish)) > MAX_INPUT_KEY else ""
    except BadSample as bad:
        return bad.reason


def other_key(key: str, uri: str) -> str:
    """The key of a second input that wishes for it."""
    return f"{key}{OWN}{digest(key, uri)}"


def wish_of(key: str) -> str:
    """The key that an input has wished for, from the one that it got."""
    return key if key.startswith(OWN) else key.split(OWN)[0]


def sample_key(shard: str, name: str, occurrence: int = 1) -> str:
    """Key of a sample.

    Raises:
        BadSample: ``bad_key``: the sample's name cannot be a file name.
    """
    check_key(name)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise BadSample("bad_key", repr(name[:80])) from error
    return check_key(f"{shard}{OWN}{_number(occurrence)}/{name}")


def bad_sample_key(shard: str, name: str, occurrence: int = 1) -> str:
    """Key of a sample whose name cannot be one."""
    named = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:12]
    return f"{shard}{OWN}bad{_number(occurrence)}/{named}"


def rest_key(shard: str) -> str:
    """Key of what cannot be read of a shard."""
    return f"{shard}{OWN}rest"


def sample_name(key: str, shard: str) -> str:
    """Name of a labelled sample in its shard, from its key."""
    return key.removeprefix(f"{shard}{OWN}/")


def _number(occurrence: int) -> str:
    return str(occurrence) if occurrence > 1 else ""


def digest(key: str, uri: str) -> str:
    """Twelve digits that tell inputs apart."""
    return hashlib.sha256(f"{key}\0{uri}".encode()).hexdigest()[:12]
