"""Whose items a rebuild may touch: organization, workspace and project, found before all else."""

from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

from everruns_pipelines.databases.postgres import Connection
from everruns_pipelines.databases.sql_files import read_sql
from everruns_pipelines.errors import FieldError, Refusal


@dataclass(frozen=True)
class RebuildRequest:
    """A rebuild as it was asked for: of one session, of some runs, or of both together.

    Args:
        organization: slug or UUID, like `workspace` and `project`.
        run_ids: values of `dreadnode.run.id`; 32 hex digits without dashes are a trace id.
        dry_run: tell what would change and write nothing.
    """

    organization: str
    workspace: str
    project: str
    session_id: str | None = None
    run_ids: tuple[str, ...] = ()
    dry_run: bool = False

    def check(self) -> None:
        """Raise a `Refusal` unless the request makes sense by itself."""
        if self.session_id is None and not self.run_ids:
            raise Refusal(
                "Name a session or at least one run",
                errors=(
                    FieldError(("session_id",), "a UUID, unless run_ids are given", "missing"),
                    FieldError(
                        ("run_ids",), "at least one, unless a session_id is given", "missing"
                    ),
                ),
            )
        errors: list[FieldError] = []
        if self.session_id is not None and as_uuid(self.session_id) is None:
            errors.append(FieldError(("session_id",), "must be a UUID", "uuid_parsing"))
        errors += [
            FieldError(("run_ids", str(number)), "must be text without NUL", "value_error")
            for number, run in enumerate(self.run_ids)
            if not run or not _is_text(run)
        ]
        if errors:
            raise Refusal(f"{errors[0].loc[0]} {errors[0].msg}", status=422, errors=tuple(errors))

    @property
    def session(self) -> UUID | None:
        """The session, parsed."""
        return None if self.session_id is None else as_uuid(self.session_id)


def as_uuid(text: str) -> UUID | None:
    """The UUID that `text` spells, if it does."""
    try:
        return UUID(text)
    except ValueError:
        return None


def _is_text(text: str) -> bool:
    """Whether the databases can be asked for it: a shell may give bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def resolve_project(connection: Connection, request: RebuildRequest) -> UUID:
    """The id of the project that a request names.

    Raises:
        Refusal: `not_found_error`, naming the first of the three that does not exist there.
    """
    organization = _find_organization(connection, request.organization)
    workspace = _find(
        connection,
        "SELECT id FROM item_workspaces WHERE organization_id = %(parent)s"
        " AND (id = %(id)s OR slug = %(slug)s) ORDER BY id = %(id)s DESC NULLS LAST",
        "workspace",
        request.workspace,
        organization,
    )
    return _find(
        connection,
        "SELECT id FROM projects WHERE workspace_id = %(parent)s"
        " AND (id = %(id)s OR slug = %(slug)s) ORDER BY id = %(id)s DESC NULLS LAST",
        "project",
        request.project,
        workspace,
    )


def hold_to(connection: Connection, organization: str, request: RebuildRequest) -> None:
    """Refuse every organization but one, as if there were no other.

    Args:
        organization: slug or UUID of the one.

    Raises:
        Refusal: `not_found_error`: the request names another one, or none that exists.
    """
    one = _find_organization(connection, organization)
    if _find_organization(connection, request.organization) != one:
        raise _not_found("organization", request.organization)


def _find_organization(connection: Connection, name: str) -> UUID:
    return _find(
        connection,
        "SELECT id FROM item_organizations WHERE id = %(id)s OR slug = %(slug)s"
        " ORDER BY id = %(id)s DESC NULLS LAST",
        "organization",
        name,
        None,
    )


def know_projects(connection: Connection, project: UUID | None) -> list[str]:
    """The names under which spans know a project, or all projects; `staged_projects` keeps them."""
    connection.execute(
        "CREATE TEMP TABLE staged_projects"
        " (name text PRIMARY KEY, project_id uuid NOT NULL, organization_id uuid NOT NULL)"
    )
    connection.execute(read_sql("everruns_pipelines.items", "projects.sql"), {"project": project})
    return [name for (name,) in connection.execute("SELECT name FROM staged_projects")]


def _find(
    connection: Connection, query: LiteralString, kind: str, name: str, parent: UUID | None
) -> UUID:
    found = None
    if _is_text(name):
        found = connection.execute(
            query, {"id": as_uuid(name), "slug": name, "parent": parent}
        ).fetchone()
    if found is None:
        raise _not_found(kind, name)
    return found[0]


def _not_found(kind: str, name: str) -> Refusal:
    return Refusal(
        f"No such {kind}: {name!a:.80}",
        code="not_found_error",
        status=404,
        errors=(FieldError((kind,), "must be the slug or the UUID of an existing one"),),
    )
