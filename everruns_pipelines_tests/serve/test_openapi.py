"""Requests made from the OpenAPI document, right and wrong: no 500, nothing outside its shapes."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode, checks

from everruns_pipelines_tests.serve.conftest import Served

_EXAMPLES = 12
CHECKS: list[Any] = [
    checks.not_a_server_error,  # pyright: ignore[reportUnknownMemberType]
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]


@pytest.mark.deploy
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_whatever_is_asked_the_answer_is_one_of_the_documents(
    served: Served, mode: GenerationMode
) -> None:
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
        @given(case=operation.as_strategy(generation_mode=mode))
        def asked(case: Any) -> None:
            response = case.call(headers=headers)
            seen.add(response.status_code)
            assert response.status_code not in (500, 502, 503, 504)
            case.validate_response(response, checks=CHECKS)

        asked()
    assert seen & {400, 404, 422}
