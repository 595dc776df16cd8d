"""Tokens of the HTTP API: made, kept as hashes in a file, and recognized.

One line of the file is one token, and deleting the line revokes it:

    nightly sha256:<64 hex digits> scopes=reports:admin,metrics:read org_id=7
    red-team sha256:<64 hex digits> scopes=items:admin organization=acme

A token is 256 random bits, so that a plain hash keeps it as well as a slow one would.
"""

import hashlib
import hmac
import logging
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from everruns_pipelines.errors import FieldError, Refusal, SettingsError

REPORTS_ADMIN, ITEMS_ADMIN, METRICS_READ = "reports:admin", "items:admin", "metrics:read"
SCOPES = (REPORTS_ADMIN, ITEMS_ADMIN, METRICS_READ)

_PREFIX = "evr_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_ORGANIZATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grant:
    """What a token allows its holder.

    Args:
        name: whose it is; tells them apart in logs and in the tags of runs.
        scopes: some of `SCOPES`.
        org_id: the one organization whose reports it reaches; None for all of them.
        organization: slug or UUID of the one whose items it reaches; None for all of them.
    """

    name: str
    scopes: frozenset[str]
    org_id: int | None = None
    organization: str | None = None

    @property
    def is_bound(self) -> bool:
        """It reaches one organization only."""
        return self.org_id is not None or self.organization is not None


def make_token(grant: Grant) -> tuple[str, str]:
    """A new token, and the line of the file that makes it known.

    Raises:
        Refusal: a name, a scope or an organization that the file could not hold.
    """
    _check(grant)
    token = _PREFIX + secrets.token_urlsafe(32)
    words = [grant.name, f"sha256:{_digest(token)}", f"scopes={','.join(sorted(grant.scopes))}"]
    if grant.org_id is not None:
        words.append(f"org_id={grant.org_id}")
    if grant.organization is not None:
        words.append(f"organization={grant.organization}")
    return token, " ".join(words)


class TokenFile:
    """The tokens that are accepted: read again whenever their file changes.

    Args:
        path: the file; None where there is none, and then no token is accepted.

    Raises:
        SettingsError: the file cannot be read, or a line of it is not understood.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._grants: tuple[tuple[str, Grant], ...] = ()
        if path is not None:
            try:
                self._seen, (self._grants, wrong) = _version(path), _read(path)
            except (OSError, UnicodeError) as error:
                raise SettingsError(
                    f"EVERRUNS_API_TOKENS: expected a file that can be read"
                    f" ({type(error).__name__})"
                ) from None
            if wrong:
                raise SettingsError(
                    f"EVERRUNS_API_TOKENS: line {wrong[0]} is none that"
                    " `everruns-pipelines token` prints"
                )

    def find(self, token: str) -> Grant | None:
        """What a token allows; None if it is not known."""
        self._read_again()
        digest = _digest(token)
        found = None
        # Every hash is compared, each in constant time: how long it takes tells nothing.
        for known, grant in self._grants:
            if hmac.compare_digest(known, digest):
                found = grant
        return found

    def _read_again(self) -> None:
        if self._path is None:
            return
        try:
            version = _version(self._path)
            if version == self._seen:
                return
            self._grants, wrong = _read(self._path)
        except (OSError, UnicodeError) as error:
            # Whatever was revoked may be in there: nobody is let in.
            self._seen, self._grants = None, ()
            _logger.error("The tokens cannot be read (%s): none is accepted", type(error).__name__)  # noqa: TRY400, its text may quote
            return
        self._seen = version
        for number in wrong:
            _logger.error("Line %d of the tokens is not understood and is skipped", number)


def _version(path: Path) -> tuple[int, int, int]:
    told = path.stat()
    return told.st_mtime_ns, told.st_size, told.st_ino


def _read(path: Path) -> tuple[tuple[tuple[str, Grant], ...], list[int]]:
    """The grants by hash, and the numbers of the lines that are not understood."""
    grants: list[tuple[str, Grant]] = []
    wrong: list[int] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            grants.append(_parse(line))
        except (Refusal, ValueError):
            wrong.append(number)
    return tuple(grants), wrong


def _parse(line: str) -> tuple[str, Grant]:
    name, hashed, *rest = line.split()
    digest = _HASH.fullmatch(hashed)
    given = dict(word.split("=", 1) for word in rest)
    if digest is None or len(given) < len(rest):
        raise ValueError("not such a line")
    grant = Grant(
        name,
        frozenset(given.pop("scopes").split(",") if "scopes" in given else ()),
        int(given.pop("org_id")) if "org_id" in given else None,
        given.pop("organization", None),
    )
    if given:
        raise ValueError("not such a line")
    _check(grant)
    return digest[1], grant


def _check(grant: Grant) -> None:
    if not _NAME.fullmatch(grant.name):
        raise _refused("name", "letters, digits, dots, dashes and underscores, at most 64")
    if not grant.scopes or not grant.scopes <= set(SCOPES):
        raise _refused("scope", f"some of {', '.join(SCOPES)}")
    if grant.is_bound:
        _check_bounds(grant)
    if grant.organization is not None and not _ORGANIZATION.fullmatch(grant.organization):
        raise _refused("organization", "the slug or the UUID of an organization")


def _check_bounds(grant: Grant) -> None:
    """A token that is bound to an organization is so in everything that it may do."""
    if REPORTS_ADMIN in grant.scopes and grant.org_id is None:
        raise _refused("org_id", f"one, since the token is bound and has {REPORTS_ADMIN}")
    if ITEMS_ADMIN in grant.scopes and grant.organization is None:
        raise _refused("organization", f"one, since the token is bound and has {ITEMS_ADMIN}")
    if METRICS_READ in grant.scopes:
        raise _refused("scope", f"no {METRICS_READ}, since it tells of every organization")


def _refused(field: str, expected: str) -> Refusal:
    return Refusal(
        f"{field}: expected {expected}", errors=(FieldError((field,), f"expected {expected}"),)
    )


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
