"""A verification as a JUnit report: what continuous integration shows as tests."""

from collections.abc import Sequence
from xml.etree import ElementTree

from .tables import reason
from .verify import Verification


def junit_report(target: str, verifications: Sequence[Verification]) -> str:
    """XML with one test case for each world, precision, accumulation and stage."""
    suite = ElementTree.Element("testsuite", name=f"windtunnel verify {target}")
    failed = 0
    for case in verifications:
        for result in case.results:
            name = f"world {case.world}, {case.precision}, accumulation {case.accumulation}, ZeRO {result.zero}"
            test = ElementTree.SubElement(suite, "testcase", classname=target, name=name)
            if not result.ok:
                failed += 1
                ElementTree.SubElement(test, "failure", message=reason(result))
    suite.set("tests", str(sum(len(case.results) for case in verifications)))
    suite.set("failures", str(failed))
    report = ElementTree.Element("testsuites")
    report.append(suite)
    ElementTree.indent(report)
    return ElementTree.tostring(report, encoding="unicode", xml_declaration=True) + "\n"
