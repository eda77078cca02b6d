"""HTTP with whatever is in the environment: proxies, certificates and the Hub."""

import dataclasses
import os
import ssl
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_swarm import FakeSwarm, NoPeers
from support.program import grokfetch
from support.torrents import content, v1_torrent
from support.web_server import HttpProxy, SocksProxy, WebServer

from grokfetch.errors import Stalled
from grokfetch.events import Notice, Outcome
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.mirror import MirrorSettings, Together, environment
from grokfetch.fetch.mirror.environment import HUB, bypassed
from grokfetch.fetch.swarm import Swarm, SwarmSettings
from grokfetch.folder.store import Store
from grokfetch.torrent.metainfo import encode_torrent

PIECE = 32768
FILES = {"a": content(6 * PIECE - 100)}
TORRENT = v1_torrent(FILES, PIECE)
LIMITS = Limits(metadata_s=20, stall_s=20)


@pytest.fixture
def server():
    with WebServer({"top/a": FILES["a"]}) as server:
        yield server


def run(root, address, variables, swarm=None):
    settings = MirrorSettings(
        connections=2, patience_s=5, rest_s=0.01, attempts=2, environment=environment(variables)
    )
    source = Together(swarm or NoPeers(TORRENT), (address,), settings=settings)
    events = list(fetch(Store(root), source, limits=LIMITS))
    assert isinstance(events[-1], Outcome)
    assert (root / "top/a").read_bytes() == FILES["a"]
    return [event.text for event in events if isinstance(event, Notice)]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NO_PROXY": "[::1],localhost,127.0.0.0/8,10.,*.corp,::1"}, None),
        ({"ALL_PROXY": "gopher://h:1", "NO_PROXY": "127.0.0.1"}, None),
        ({"ALL_PROXY": "http://127.0.0.1:1", "no_proxy": "127.0.0.0/8"}, None),
        ({"ALL_PROXY": "http://h:port", "NO_PROXY": "*"}, None),
        ({"SSL_CERT_FILE": "/not/there"}, "SSL_CERT_FILE"),
        ({"SSL_CERT_FILE": "/"}, "SSL_CERT_FILE"),
        ({"SSL_CERT_FILE": "/dev/null"}, "SSL_CERT_FILE"),
        ({"REQUESTS_CA_BUNDLE": "/not/there"}, "REQUESTS_CA_BUNDLE"),
        ({"CURL_CA_BUNDLE": "/not/there"}, "CURL_CA_BUNDLE"),
        ({"HF_ENDPOINT": "nonsense"}, "HF_ENDPOINT"),
        ({"HF_TOKEN": "two words"}, "HF_TOKEN"),
    ],
)
def test_whatever_the_environment_holds_the_fetch_goes_on_and_says_it_once(
    tmp_path, server, variables, said
):
    notices = run(tmp_path, server.url, variables)
    assert len(notices) == (said is not None)
    assert all(said in text for text in notices)


@pytest.mark.parametrize("address", ["gopher://h:1", "http://h:port", "http://", "socks4://h:1"])
def test_a_proxy_that_cannot_be_used_leaves_all_to_peers(tmp_path, server, address):
    peers = FakeSwarm(TORRENT, dict(FILES))
    [text] = run(tmp_path, server.url, {"ALL_PROXY": address}, peers)
    assert "ALL_PROXY names a proxy that cannot be used" in text
    assert server.asked == []


def test_where_nothing_else_is_left_the_variable_is_named_in_the_error(tmp_path, server):
    alone = Swarm(TORRENT, SwarmSettings.loopback())
    with pytest.raises(Stalled, match="ALL_PROXY"):
        run(tmp_path, server.url, {"ALL_PROXY": "gopher://h:1"}, alone)


@pytest.mark.parametrize("kind", ["socks", "socks5", "socks5h"])
def test_a_socks_proxy_is_gone_through_as_desktops_write_it_too(tmp_path, server, kind):
    address = server.url.replace("127.0.0.1", "mirror.invalid")
    with SocksProxy() as proxy:
        variables = {"ALL_PROXY": f"{kind}://me:secret@127.0.0.1:{proxy.port}/"}
        notices = run(tmp_path, address, variables)
    assert set(proxy.asked) == {(b"mirror.invalid", b"me", b"secret")}
    assert len(notices) == (kind == "socks")
    assert not any("secret" in text for text in notices)


def test_the_command_ends_in_no_traceback_under_a_companys_environment(
    tmp_path, server, monkeypatch
):
    monkeypatch.setenv("NO_PROXY", "localhost,[::1],10.0.0.0/8,.corp.example")
    monkeypatch.setenv("ALL_PROXY", "gopher://proxy:1")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path))
    torrent = tmp_path / "t.torrent"
    torrent.write_bytes(encode_torrent(TORRENT))
    arguments = ("fetch", torrent, "--to", tmp_path / "out", "--web-seed", server.url)
    alone = ("--listen", "127.0.0.1:0", "--no-discovery")
    text = grokfetch(*arguments, *alone, code=Stalled.exit_code)
    assert "ALL_PROXY" in text
    monkeypatch.setenv("NO_PROXY", "127.0.0.0/8")
    grokfetch(*arguments, *alone)


@pytest.mark.parametrize(
    ("entries", "host", "port", "excepted"),
    [
        ("*", "h", 80, True),
        ("h.example", "h.example", 80, True),
        ("h.example", "a.h.example", 80, True),
        ("h.example", "ah.example", 80, False),
        (".h.example", "a.h.example", 80, True),
        ("*.h.example", "a.h.example", 80, True),
        ("h.example:8080", "h.example", 80, False),
        ("h.example:8080", "h.example", 8080, True),
        ("http://h.example", "h.example", 80, True),
        ("10.0.0.0/8", "10.200.3.4", 80, True),
        ("10.0.0.0/8", "11.0.0.1", 80, False),
        ("10.", "10.200.3.4", 80, True),
        ("192.168.*", "192.168.3.4", 80, True),
        ("10.1", "10.100.0.1", 80, False),
        ("[::1]", "::1", 80, True),
        ("[::1]:8080", "::1", 80, False),
        ("::1", "::1", 80, True),
        ("fd00::/8", "fd12::3", 80, True),
        ("", "h", 80, False),
    ],
)
def test_what_no_proxy_excepts(entries, host, port, excepted):
    found = environment({"NO_PROXY": entries, "ALL_PROXY": "http://p:1"})
    assert (found.proxy("http", host, port) is None) == excepted


@given(st.lists(st.text()), st.text(), st.integers(0, 65535))
def test_no_entry_of_no_proxy_is_a_failure(entries, host, port):
    bypassed(tuple(entries), host, port)


def test_the_proxy_of_the_scheme_goes_before_that_of_all_and_lower_case_before_upper():
    variables = {"ALL_PROXY": "http://all:1", "https_proxy": "low:2", "HTTPS_PROXY": "http://up:3"}
    found = environment(variables)
    assert found.proxy("https", "h", 443) == "http://low:2"
    assert found.proxy("http", "h", 80) == "http://all:1"
    # A client of a CGI script must not choose its proxy.
    cgi = {"HTTP_PROXY": "http://evil:1", "REQUEST_METHOD": "GET"}
    assert environment(cgi).proxy("http", "h", 80) is None


# --- certificates --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1, and a server's context with it."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-nodes", "-days", "3650"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-keyout", key, "-out", cert, "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return cert, context


def test_an_unknown_certificate_drops_a_mirror_at_once_and_is_the_reason_at_the_end(
    tmp_path, certificate
):
    _, context = certificate
    with WebServer({"top/a": FILES["a"]}, context) as server:
        alone = Swarm(TORRENT, SwarmSettings.loopback())
        with pytest.raises(Stalled, match="its certificate is not valid: self-signed"):
            run(tmp_path, server.url, {}, alone)


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_certificate_that_the_environment_names_is_trusted(tmp_path, certificate, name):
    cert, context = certificate
    with WebServer({"top/a": FILES["a"]}, context) as server:
        assert run(tmp_path, server.url, {name: str(cert)}) == []


def test_certificates_are_read_once_and_again_when_their_file_has_changed(
    tmp_path, certificate, monkeypatch
):
    read = []

    class Context(ssl.SSLContext):
        def load_verify_locations(self, cafile):
            read.append(cafile)
            super().load_verify_locations(cafile)

    monkeypatch.setattr(ssl, "SSLContext", Context)
    file = tmp_path / "certificates.pem"
    contents = [b"none yet", certificate[0].read_bytes()]
    for index, data in enumerate(contents):
        file.write_bytes(data)
        os.utime(file, (index, index))
        for _ in range(2):
            found = environment({"SSL_CERT_FILE": str(file)})
            assert found.certificates == (file if index else None)
            assert bool(found.notices) == (not index)
    assert read == [file, file]


def test_mirrors_are_reached_through_an_http_proxy_with_tls_and_without(
    tmp_path, server, certificate, monkeypatch
):
    cert, context = certificate
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    torrent = tmp_path / "t.torrent"
    torrent.write_bytes(encode_torrent(TORRENT))
    plain = server.url.replace("127.0.0.1", "mirror.invalid")
    with WebServer({"top/a": FILES["a"]}, context) as secure, HttpProxy() as proxy:
        through = ("--proxy", f"http://me:s%40cret@127.0.0.1:{proxy.port}", "--no-discovery")
        for folder, address in {"plain": plain, "secure": secure.url}.items():
            source = (torrent, "--to", tmp_path / folder, "--web-seed", address)
            grokfetch("fetch", *source, *through, "--listen", "127.0.0.1:0")
            assert (tmp_path / folder / "top/a").read_bytes() == FILES["a"]
    assert set(proxy.asked) == {
        ("GET", "mirror.invalid", b"me:s@cret"),
        ("CONNECT", "127.0.0.1", b"me:s@cret"),
    }


# --- the Hub -------------------------------------------------------------------------------------


def test_the_hubs_endpoint_and_token_are_heeded_and_the_token_goes_nowhere_else(tmp_path, server):
    with WebServer({}) as hub:
        hub.redirects = {"org/repo/resolve/main/a": f"{server.url}/top/a"}
        variables = {"HF_ENDPOINT": f"{hub.url}/", "HF_TOKEN": "hf_secret"}
        assert run(tmp_path, f"{HUB}/org/repo/resolve/main/{{path}}", variables) == []
    assert set(hub.tokens) == {"Bearer hf_secret"}
    assert set(server.tokens) == {None}


def test_a_token_is_sent_to_the_hub_alone():
    found = environment({"HF_TOKEN": "hf_x"})
    assert found.token_for("https", "huggingface.co", None) == "hf_x"
    assert found.token_for("http", "huggingface.co", None) is None
    assert found.token_for("https", "huggingface.co", 444) is None
    assert found.token_for("https", "evil-huggingface.co", None) is None
    assert "hf_x" not in repr(found)
    assert found.at_hub("https://huggingface.co.evil/x") == "https://huggingface.co.evil/x"


def test_an_address_of_a_stranger_stays_where_it_says(tmp_path):
    named = dataclasses.replace(TORRENT, web_seeds=(f"{HUB}/x/{{path}}",))
    found = environment({"HF_ENDPOINT": "http://127.0.0.1:1"})
    source = Together(NoPeers(named), settings=MirrorSettings(environment=found))
    list(source.meet(named))
    assert [mirror.address for mirror in source.alive] == [f"{HUB}/x/{{path}}"]
