"""The files in deploy/: that they agree with each other, with ssv-serve and with the metrics.

What an image does is not tested here.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssv.runtime.serving.metrics import (
    COUNTERS,
    GAUGES,
    HISTOGRAMS,
    INVALID,
    REFUSED,
    REQUESTS,
    RESTARTS,
    RUNNING,
    STANDINGS,
)
from ssv.triton_repo import checks, front, serve
from ssv.triton_repo.openai.app import create_app
from ssv.triton_repo.openai.translation import Models

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
YAML_FILES = sorted(path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".yml"))
MANIFESTS = sorted(KUBERNETES.rglob("*.yaml"))

TRITON_GAUGES = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes"}

STOP_SECONDS = 25.0
"""The seconds that ssv-serve may need beyond its drain.

A last look at the metrics (5), the OpenAI API (5), tritonserver (10), and what ssv-serve does between.
"""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def document(path: Path) -> dict[str, Any]:
    (found,) = yaml.safe_load_all(path.read_text())
    return found


def dockerfile(name: str = "Dockerfile") -> dict[str, list[str]]:
    """Arguments of each instruction, by the instruction's name."""
    lines = [line for line in (DEPLOY / name).read_text().splitlines() if not line.startswith("#")]
    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line:
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(rest)
    return found


def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: found.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def entrypoint() -> list[str]:
    return json.loads(dockerfile()["ENTRYPOINT"][0])


IMAGES = ("Dockerfile", "Dockerfile.cpu")
COMPOSE = document(DEPLOY / "compose.yaml")
COMPOSE_CPU = document(DEPLOY / "compose.cpu.yaml")
SERVICE = COMPOSE["services"]["ssv"]
DEPLOYMENT = document(KUBERNETES / "deployment.yaml")
POD = DEPLOYMENT["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]
DASHBOARD = json.loads((DEPLOY / "grafana" / "ssv.json").read_text())
COMMANDS = {"image": json.loads(dockerfile()["CMD"][0]), "compose": SERVICE["command"], "kubernetes": CONTAINER["args"]}


def served(where: str) -> argparse.Namespace:
    """What ssv-serve makes of its command line; ends the test when it knows a flag or a value not."""
    program, *arguments = entrypoint()
    assert program == "ssv-serve"
    return serve._parser().parse_args(arguments + COMMANDS[where])


def ports_of(args: argparse.Namespace) -> dict[str, int]:
    return {"http": args.http_port, "grpc": args.grpc_port, "metrics": args.metrics_port, "openai": args.openai_port}


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)(s|m)", text)
    assert match, text
    return int(match[1]) * {"s": 1, "m": 60}[match[2]]


def num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)(Mi|Gi|m|g|gb)", text)
    assert match, text
    return int(match[1]) << {"m": 20, "g": 30}[match[2][0].lower()]


@pytest.mark.parametrize("path", YAML_FILES, ids=name_of)
def test_yaml_parses(path: Path) -> None:
    assert all(yaml.safe_load_all(path.read_text()))


# The command line


@pytest.mark.parametrize("where", COMMANDS)
def test_the_command_line_is_one_of_ssv_serve(where: str) -> None:
    args = served(where)
    checks.check_options(args)
    assert (args.device, args.host) == ("cuda", "0.0.0.0")
    assert str(args.bundle) == "/models/bundle"
    assert str(args.tritonserver) == "/opt/tritonserver/bin/tritonserver"


def test_ports_agree() -> None:
    ports = ports_of(served("kubernetes"))
    assert ports_of(served("compose")) == ports
    assert {int(port) for port in dockerfile()["EXPOSE"][0].split()} == set(ports.values())
    assert {port["name"]: port["containerPort"] for port in CONTAINER["ports"]} == ports

    service = document(KUBERNETES / "service.yaml")["spec"]["ports"]
    assert {port["name"]: port["port"] for port in service} == ports
    assert all(port["targetPort"] == port["name"] for port in service)

    published = [port.rsplit(":", 2) for port in SERVICE["ports"]]
    assert {int(inside) for _, _, inside in published} == set(ports.values())
    assert all(outside == inside for _, outside, inside in published)


def test_probes_ask_what_the_server_answers() -> None:
    http, ready = served("kubernetes").http_port, "/v2/health/ready"
    assert f'"{ready}"' in Path(front.__file__).read_text()
    for image in IMAGES:
        assert f"http://127.0.0.1:{http}{ready}" in dockerfile(image)["HEALTHCHECK"][0]
    probes = {name: CONTAINER[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert all(probe["port"] == "openai" for probe in probes.values()), "the door that clients use"
    app = create_app(None, Models("m", (), 0))  # type: ignore[arg-type]
    routes = {route.path for route in app.routes}  # type: ignore[attr-defined]
    assert {probe["path"] for probe in probes.values()} <= routes
    assert probes["startup"]["path"] == probes["readiness"]["path"] == "/health"
    assert probes["liveness"]["path"] == "/live", "whatever becomes of the engines: ssv-serve looks after them"


def test_nobody_steps_in_before_ssv_serve_gives_up() -> None:
    needs = served("kubernetes").ready_timeout
    for name in ("startup", "liveness"):
        probe = CONTAINER[f"{name}Probe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] > needs, name
    start_period = re.search(r"--start-period=(\S+)", dockerfile()["HEALTHCHECK"][0])
    assert start_period and seconds(start_period[1]) > served("image").ready_timeout


def test_there_is_time_to_drain() -> None:
    assert seconds(SERVICE["stop_grace_period"]) >= served("compose").drain_timeout + STOP_SECONDS
    command = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    drain = float(command[1]) + served("kubernetes").drain_timeout
    assert POD["terminationGracePeriodSeconds"] >= drain + STOP_SECONDS


# The image


def test_the_image_has_what_the_server_needs_and_not_two_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    extras = setup_arguments(monkeypatch)["extras_require"]
    chosen = dict(arg.split("=") for arg in dockerfile()["ARG"])["SSV_EXTRAS"].split(",")
    unknown = set(chosen) - set(extras)
    assert not unknown, f"setup.py has no extras {sorted(unknown)}"
    installed = {re.split(r"[=<>\[]", name)[0] for extra in chosen for name in extras[extra]}
    assert {"torch", "numpy", "transformers", "tritonclient", "psutil"} <= installed
    assert "nvidia-pytriton" not in installed


def test_the_image_is_named_after_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    version = setup_arguments(monkeypatch)["version"]
    assert SERVICE["image"] == CONTAINER["image"] == f"ssv:{version}"
    assert f"--tag ssv:{version} " in (DEPLOY / "Dockerfile").read_text()


def test_the_build_context_has_the_package_and_little_else(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] != "#"]
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    arguments = setup_arguments(monkeypatch)
    folders = set(arguments["package_dir"].values())
    files = {"setup.py", "pyproject.toml", "README.md", "constraints.txt", *arguments["license_files"]}
    assert kept == folders | files
    assert all((ROOT / name).exists() for name in kept)
    dropped = [line for line in lines if line.startswith("**/")]
    sources = [source for extension in arguments["ext_modules"] for source in extension.sources]
    assert not [source for source in sources if any(fnmatch(source, f"*{line[2:]}") for line in dropped)]
    copied = [shlex.split(line)[0] for line in dockerfile()["COPY"]]
    assert set(copied) <= kept


def test_the_image_is_not_roots() -> None:
    (user,) = dockerfile()["USER"]
    assert user == "1000:1000"
    assert dockerfile()["STOPSIGNAL"] == ["SIGTERM"]
    home = dict(entry.split("=", 1) for entry in shlex.split(dockerfile()["ENV"][0]))["HOME"]
    assert home in {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    # Kernels are compiled into it, and loaded from it.
    (cache,) = [entry for entry in SERVICE["tmpfs"] if entry.startswith(f"{home}:")]
    assert "exec" in cache.split(":")[1].split(",")


# The CPU image


def test_the_cpu_image_is_the_other_one_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = dockerfile(), dockerfile("Dockerfile.cpu")
    for name in ("USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "COPY"):
        assert one[name] == other[name], name
    program, *given = json.loads(other["ENTRYPOINT"][0])
    assert program == "ssv-serve"
    for command in (json.loads(other["CMD"][0]), COMPOSE_CPU["services"]["ssv"]["command"]):
        args = serve._parser().parse_args(given + command)
        checks.check_options(args)
        assert (args.device, args.host, args.tritonserver) == ("cpu", "0.0.0.0", None)
    arguments = setup_arguments(monkeypatch)
    assert "nvidia-pytriton==0.7.0" in arguments["extras_require"]["serve"]
    (torch,) = re.findall(r'"(torch==[^"]+)"', " ".join(other["RUN"]))
    assert torch == f"{arguments['extras_require']['runtime'][0]}+cpu"
    ignored = [(DEPLOY / f"{image}.dockerignore").read_text() for image in IMAGES]
    assert ignored[0] == ignored[1]


def test_compose_for_a_cpu_differs_by_the_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = dict(COMPOSE_CPU["services"]["ssv"]), dict(SERVICE)
    version = setup_arguments(monkeypatch)["version"]
    assert ours.pop("image") == f"ssv:{version}-cpu"
    assert ours.pop("build") == {"context": "..", "dockerfile": "deploy/Dockerfile.cpu"}
    assert ours.pop("command")[2:] == theirs.pop("command")[2:]
    assert set(ours.pop("tmpfs")) < set(theirs.pop("tmpfs")), "no kernels are compiled"
    del theirs["image"], theirs["build"], theirs["deploy"]
    assert ours == theirs


# Compose


def test_compose_keeps_to_this_machine() -> None:
    for service in COMPOSE["services"].values():
        assert all(port.startswith(("${SSV_BIND:-127.0.0.1}:", "127.0.0.1:")) for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "on-failure"
        assert not {"privileged", "network_mode", "pid", "ipc", "cap_add"} & set(service)
    assert SERVICE["read_only"] is SERVICE["init"] is True
    assert {entry.split(":")[0] for entry in SERVICE["tmpfs"]} >= {"/tmp"}
    assert num_bytes(SERVICE["shm_size"]) >= 1 << 30


def test_compose_gives_a_gpu_and_a_bundle_that_is_only_read() -> None:
    (device,) = SERVICE["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    (volume,) = SERVICE["volumes"]
    assert (volume["type"], volume["read_only"]) == ("bind", True)
    assert volume["target"] == str(served("compose").bundle)


def test_compose_names_files_that_there_are() -> None:
    build = SERVICE["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
                assert volume.endswith(":ro")
            else:
                assert source.startswith("${") or source in COMPOSE["volumes"]


def test_compose_monitors_only_when_asked() -> None:
    profiles = {name: service.get("profiles") for name, service in COMPOSE["services"].items()}
    assert profiles == {"ssv": None, "prometheus": ["monitoring"], "grafana": ["monitoring"]}


def test_prometheus_and_grafana_find_each_other_and_the_server() -> None:
    services = COMPOSE["services"]
    (job,) = document(DEPLOY / "prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"ssv:{served('compose').metrics_port}"]}]

    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = document(provisioning / "datasources" / "prometheus.yaml")["datasources"]
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()  # type: ignore[union-attr]
    assert services[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    scraped = document(DEPLOY / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scraped

    (provider,) = document(provisioning / "dashboards" / "ssv.yaml")["providers"]
    targets = {volume.split(":")[1] for volume in services["grafana"]["volumes"]}
    assert f"{provider['options']['path']}/ssv.json" in targets


def test_docker_compose_takes_it() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no docker compose")
    command = [
        docker,
        "compose",
        "--file",
        str(DEPLOY / "compose.yaml"),
        "--profile",
        "monitoring",
        "config",
        "--quiet",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Kubernetes


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_objects_are_named_and_leave_the_namespace_open(path: Path) -> None:
    found = document(path)
    assert {"apiVersion", "kind", "metadata", "spec"} <= set(found)
    assert found["metadata"]["name"].startswith("ssv")
    assert "namespace" not in found["metadata"]


@pytest.mark.parametrize("path", MANIFESTS, ids=name_of)
def test_objects_keep_to_the_schema_of_kubernetes(path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    found = document(path)
    if found["kind"] in ("ServiceMonitor", "PrometheusRule"):
        pytest.skip("not of Kubernetes itself")
    validate.validate(found, validate.latest_version(), strict=True)


def test_nothing_needs_an_operator_unless_it_lies_apart() -> None:
    groups = {document(path)["apiVersion"].split("/")[0] for path in KUBERNETES.glob("*.yaml")}
    assert groups <= {"v1", "apps", "policy", "networking.k8s.io"}


def test_selectors_choose_the_pods() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    service = document(KUBERNETES / "service.yaml")
    selectors = [
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        document(KUBERNETES / "poddisruptionbudget.yaml")["spec"]["selector"]["matchLabels"],
        document(KUBERNETES / "networkpolicy.yaml")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    loader = document(KUBERNETES / "loader" / "pod.yaml")["metadata"]["labels"]
    assert not any(selector.items() <= loader.items() for selector in selectors)

    monitor = document(KUBERNETES / "monitoring" / "servicemonitor.yaml")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"


def test_the_budget_lets_a_pod_go_and_keeps_one() -> None:
    most = document(KUBERNETES / "poddisruptionbudget.yaml")["spec"]["maxUnavailable"]
    assert 0 < most < DEPLOYMENT["spec"]["replicas"]


def test_the_network_is_open_to_clients_and_to_prometheus_alone() -> None:
    spec = document(KUBERNETES / "networkpolicy.yaml")["spec"]
    assert (spec["policyTypes"], spec["egress"]) == (["Ingress", "Egress"], [])
    ports = ports_of(served("kubernetes"))
    clients, prometheus = spec["ingress"]
    assert {port["port"] for port in clients["ports"]} == {ports[name] for name in ("http", "grpc", "openai")}
    assert {port["port"] for port in prometheus["ports"]} == {ports["metrics"]}
    assert all(list(source) == ["podSelector"] and source["podSelector"] for source in clients["from"])
    assert all(list(source) == ["namespaceSelector"] and source["namespaceSelector"] for source in prometheus["from"])


@pytest.mark.parametrize("pod", [POD, document(KUBERNETES / "loader" / "pod.yaml")["spec"]], ids=["server", "loader"])
def test_pods_are_restricted(pod: dict[str, Any]) -> None:
    """As Kubernetes' Pod Security Standard `restricted` asks for, and with a root file system that is only read."""
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == dockerfile()["USER"][0]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_server_has_a_gpu_its_bundle_and_memory_to_share() -> None:
    limits = CONTAINER["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == 1
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in CONTAINER["volumeMounts"]}
    assert {"/tmp", "/dev/shm", "/cache"} <= set(mounts)
    shared = volumes[mounts["/dev/shm"]["name"]]["emptyDir"]
    assert shared["medium"] == "Memory"
    # What lies in memory counts as the container's.
    assert 1 << 30 <= num_bytes(shared["sizeLimit"]) < num_bytes(limits["memory"])

    models = mounts[str(served("kubernetes").bundle.parent)]
    claim = volumes[models["name"]]["persistentVolumeClaim"]
    assert models["readOnly"] is claim["readOnly"] is True
    assert claim["claimName"] == document(KUBERNETES / "bundle.yaml")["metadata"]["name"]
    loader = document(KUBERNETES / "loader" / "pod.yaml")["spec"]
    assert loader["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["claimName"]
    assert loader["containers"][0]["volumeMounts"][0]["mountPath"] == models["mountPath"]


# The dashboard

PANELS = DASHBOARD["panels"]
EXPRESSIONS = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def metrics_in(expression: str) -> set[str]:
    for label in (r'"[^"]*"', r"\{[^}]*\}", r"\[[^\]]*\]", r"\bby \([^)]*\)"):
        expression = re.sub(label, " ", expression)
    functions = {"sum", "min", "max", "rate", "increase", "vector", "or", "and", "histogram_quantile"}
    return set(re.findall(r"[a-zA-Z_][\w:]*", expression)) - functions


COUNTED = {
    *COUNTERS,
    *(name for name, _ in (REQUESTS, REFUSED, INVALID, RESTARTS)),
    *(f"{name}_{end}" for name in HISTOGRAMS for end in ("bucket", "sum", "count")),
}
MEASURED = {*GAUGES, *STANDINGS, RUNNING[0], *TRITON_GAUGES}


def check_expression(expression: str) -> None:
    """That it is on metrics that there are, in ways that mean something."""
    for left, right in ("()", "{}", "[]"):
        assert expression.count(left) == expression.count(right)
    used = metrics_in(expression) - {"instance", "process"}
    assert used and used <= COUNTED | MEASURED
    # A counter begins anew with ssv-serve: only its increase means something. A gauge's does not.
    increased = set(re.findall(r"(?:rate|increase)\((\w+)", expression))
    assert used & COUNTED == increased
    # By labels that these have.
    labels = {label for found in re.findall(r"by \(([^)]+)\)", expression) for label in re.split(r",\s*", found)}
    own = {"tier", "instance"}
    own |= {"reason"} if used <= {REQUESTS[0], REFUSED[0]} else set()
    own |= {"process"} if used == {RESTARTS[0]} else set()
    own |= {"le"} if all(name.endswith("_bucket") for name in used) else set()
    assert labels <= own
    assert ("histogram_quantile" in expression) == ("le" in labels)


def test_a_metric_is_found_in_an_expression() -> None:
    assert metrics_in('sum by (tier) (rate(a{b="c"}[1m])) / (d > 0) or vector(0)') == {"a", "d"}


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS, ids=[title for title, _ in EXPRESSIONS])
def test_expressions_are_on_metrics_that_there_are(title: str, expression: str) -> None:
    check_expression(expression)


def test_times_are_of_answered_requests_and_called_what_they_are() -> None:
    """Which histograms are, and counts of requests are not."""
    times = [(title, expression) for title, expression in EXPRESSIONS if "_seconds" in expression]
    assert len(times) == 6
    for title, expression in times:
        assert not metrics_in(expression) & {*COUNTERS, REQUESTS[0], REFUSED[0]}
        kind = "p95 " if "histogram_quantile(0.95" in expression else "Mean "
        assert title.startswith(kind)
    assert all(f"{name}_bucket" in " ".join(expression for _, expression in times) for name in HISTOGRAMS)


def test_tokens_per_pass_go_without_the_first_of_answered_requests_alone() -> None:
    (expression,) = [expression for title, expression in EXPRESSIONS if title.startswith("Tokens per target pass")]
    assert "ssv_requests{reason=~" in expression


def test_refusals_are_shown_apart_from_what_was_taken() -> None:
    for _, expression in EXPRESSIONS:
        assert not {REQUESTS[0], REFUSED[0]} <= metrics_in(expression)
    assert any(REFUSED[0] in expression for _, expression in EXPRESSIONS)


# Rules

RULES = [rule for group in document(DEPLOY / "prometheus-rules.yml")["groups"] for rule in group["rules"]]
RECORDED = {rule["record"]: rule for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}


@pytest.mark.parametrize("name", [*RECORDED, *ALERTS])
def test_rules_are_on_metrics_that_there_are(name: str) -> None:
    expression = {**RECORDED, **ALERTS}[name]["expr"]
    for recorded in sorted(RECORDED, key=len, reverse=True):  # an alert may ask for what is recorded
        expression = expression.replace(recorded, f"({RECORDED[recorded]['expr']})") if name in ALERTS else expression
    check_expression(expression)
    assert "$__" not in expression, "a variable of Grafana's"


def test_rules_are_named_as_prometheus_wants_it() -> None:
    for name in RECORDED:
        level, metric, operation = name.split(":")
        assert level in ("tier", "ssv") and re.fullmatch(r"(p95|mean|rate|share)_(5m|1h)", operation)
        assert f"[{operation.rpartition('_')[2]}]" in RECORDED[name]["expr"]
        assert level == "ssv" or f"{metric}" in RECORDED[name]["expr"]
        assert ("by (tier" in RECORDED[name]["expr"]) == (level == "tier")


def test_alerts_say_what_is_wrong() -> None:
    assert len(ALERTS) >= 6
    for name, alert in ALERTS.items():
        assert name.startswith("Ssv")
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert set(alert["annotations"]) == {"summary", "description"}
        labels = set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))
        shown = alert["expr"]
        for recorded, rule in RECORDED.items():
            shown = shown.replace(recorded, rule["expr"])
        assert all(re.search(rf"by \([^)]*\b{label}\b", shown) for label in labels)
    failures = ALERTS["SsvRequestsFail"]["expr"]
    assert "refused" not in failures + RECORDED[failures.split()[0]]["expr"]


def test_prometheus_reads_the_rules() -> None:
    (path,) = document(DEPLOY / "prometheus.yml")["rule_files"]
    assert f"./prometheus-rules.yml:{path}:ro" in COMPOSE["services"]["prometheus"]["volumes"]
    rule = document(KUBERNETES / "monitoring" / "prometheusrule.yaml")
    assert (rule["kind"], rule["spec"]) == ("PrometheusRule", document(DEPLOY / "prometheus-rules.yml"))


def test_promtool_takes_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool")
    done = subprocess.run([promtool, "check", "rules", str(DEPLOY / "prometheus-rules.yml")], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_share_of_audited_tokens_stands_beside_their_number() -> None:
    titles = [panel["title"] for panel in PANELS]
    assert titles.index("Audited tokens") == titles.index("Audit mismatch share") + 1
    (series,) = [panel["targets"] for panel in PANELS if panel["title"].startswith("Audit mismatch share by tier")]
    assert metrics_in(series[1]["expr"]) == {"ssv_audited_tokens"}


def test_panels_have_ids_places_and_the_datasource_that_was_chosen() -> None:
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": f"${{{variable['name']}}}"}
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)
    for panel in PANELS:
        assert panel["datasource"] == chosen
        assert all(target["datasource"] == chosen for target in panel["targets"])
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in PANELS], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, f"{one} overlaps {other}"
