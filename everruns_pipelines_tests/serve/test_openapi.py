"""Requests made from the OpenAPI document, right and wrong: no 500, nothing outside its shapes."""

from typing import Any

import pytest

from everruns_pipelines_tests.serve.conftest import Served

_EXAMPLES = 12


@pytest.mark.deploy
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_whatever_is_asked_the_answer_is_one_of_the_documents(served: Served, mode: str) -> None:
    # Here, since they take seconds to load.
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode, checks

    all_checks: list[Any] = [
        checks.not_a_server_error,  # pyright: ignore[reportUnknownMemberType]
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.response_headers_conformance,
    ]
    schema: Any = schemathesis.openapi.from_url(f"{served.url}/api/openapi.json")
    # They launch, and wait for nothing.
    headers = {"Authorization": f"Bearer {served.tokens['fuzz']}", "Prefer": "respond-async"}
    operations = [one.ok() for one in schema.get_all_operations()]
    assert len(operations) == 4
    seen: set[int] = set()
    for operation in operations:
        assert operation is not None

        @settings(
            max_examples=_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        )
        @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
        def asked(case: Any) -> None:
            response = case.call(headers=headers)
            seen.add(response.status_code)
            assert response.status_code not in (500, 502, 503, 504)
            case.validate_response(response, checks=all_checks)

        asked()
    assert seen & {400, 404, 422}
