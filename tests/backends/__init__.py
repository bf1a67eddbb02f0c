import pytest

# It holds assertions and is no test module: let them tell what they compared.
pytest.register_assert_rewrite("tests.backends.conformance")
