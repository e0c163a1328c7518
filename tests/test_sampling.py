"""Which cases of a test with many run by default."""

import itertools

from tests.sampling import sample


def test_every_value_of_every_parameter_is_sampled():
    cases = [dict(zip("abc", values, strict=True)) for values in itertools.product(range(3), range(2), range(4))]
    kept = [cases[i] for i in sample(cases, 4)]
    assert len(kept) == 4
    for name, count in (("a", 3), ("b", 2), ("c", 4)):
        assert {case[name] for case in kept} == set(range(count))


def test_a_sample_is_at_most_all():
    assert sample([{"a": 0}, {"a": 1}], 5) == {0, 1}
    assert sample([{"a": 0}, {"a": 1}], 1) == {0}


def test_the_sample_of_a_marked_test_is_what_runs(pytester):
    pytester.makeconftest(
        """
        from tests.sampling import leave_out_unsampled

        def pytest_configure(config):
            config.addinivalue_line("markers", "sample(n): n of the cases")
            config.addinivalue_line("markers", "covered(by): none of the cases")

        def pytest_collection_modifyitems(config, items):
            leave_out_unsampled(config, items)
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("a", range(5))
        @pytest.mark.sample(2)
        def test_some(a): pass

        @pytest.mark.parametrize("c", [None, 3])
        @pytest.mark.parametrize(("a", "b"), [("x", {}), ("y", [])])
        @pytest.mark.sample(2)
        def test_stacked(a, b, c): pass

        def test_other(): pass

        @pytest.mark.covered("by test_other")
        def test_covered(): pass
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-v")
    result.assert_outcomes(passed=5, deselected=6)
    # Every value of every parameter, which the first two cases would not have.
    result.stdout.fnmatch_lines(["*test_stacked?x-b0-None? PASSED*", "*test_stacked?y-b1-3? PASSED*"])
