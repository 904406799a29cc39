"""Which clusters are refused, before anything is connected to."""

from __future__ import annotations

import pytest

from dipgo_core.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_ray_client_is_refused_with_both_other_ways() -> None:
    from orchestrator.executors.ray_tune.run import RayTuneExecutor

    with pytest.raises(
        ConfigError, match=r"--address head:6379.*submit FILE --address http://head"
    ):
        RayTuneExecutor("ray://head:10001")


def test_ray_client_in_the_environment_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.executors.ray_tune.run import RayTuneExecutor

    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match="Ray Client"):
        RayTuneExecutor()


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_cluster_that_others_reach_needs_a_token(
    mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.executors.ray_tune.connect import connect

    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE.*--insecure"):
        connect("192.0.2.7:6379", insecure=False)  # TEST-NET-1: nobody has this address


@pytest.mark.parametrize(
    ("host", "stays"),
    [("127.0.0.1", True), ("127.4.5.6", True), ("localhost", True), ("::1", True),
     ("192.0.2.7", False), ("0.0.0.0", False), ("no-such-host.invalid", False)],
)  # fmt: skip
def test_only_loopback_stays_on_this_machine(host: str, stays: bool) -> None:
    from orchestrator.executors.ray_tune.connect import is_loopback

    assert is_loopback(host) is stays


def test_settings_of_authentication_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    from orchestrator.executors.ray_tune.connect import quiet_environment

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")  # so that it is gone afterwards
    del os.environ["RAY_AUTH_TOKEN_PATH"]
    with quiet_environment():
        assert os.environ["RAY_AUTH_MODE"] == "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = "as Ray sets it"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == "as Ray sets it"


@pytest.mark.parametrize("address", ["head:6379", "ray://head:10001", "ftp://head", "http://"])
def test_job_server_is_an_http_address(address: str) -> None:
    from orchestrator.executors.ray_tune.jobs import check_server

    with pytest.raises(ConfigError, match="no address of a job server"):
        check_server(address, insecure=True)


def test_job_server_that_others_reach_needs_a_token() -> None:
    from orchestrator.executors.ray_tune.jobs import check_server

    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE.*--insecure"):
        check_server("http://192.0.2.7:8265", insecure=False)
    check_server("http://192.0.2.7:8265", insecure=True)
    check_server("http://127.0.0.9:8265", insecure=False)
