"""The ``baton`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Each command imports what it needs: `baton model` must be quick when there is nothing to do.


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the command, returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="baton", description="Prefill and decode in separate replicas: vLLM over Ray Serve."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="start etcd, Ray and the application, and serve")
    _add_config(up)
    up.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="to get ready")
    up.add_argument("--dashboard", action="store_true", help="with Ray's dashboard")
    up.set_defaults(run=_up)

    check = commands.add_parser("check", help="check a configuration and its surroundings")
    _add_config(check)
    check.set_defaults(run=_check)

    model = commands.add_parser("model", help="fetch and convert the demo model, once")
    model.set_defaults(run=_model)

    proxy = commands.add_parser("proxy", help="OpenAI endpoint over vLLM servers, without Ray")
    _add_proxy(proxy)
    proxy.set_defaults(run=_proxy)

    # Everything after the name is vLLM's: with another prefix, nothing in it is an option of ours.
    vllm = commands.add_parser(
        "vllm-serve",
        help="vLLM's OpenAI server as prefill or decode node, with all of its options",
        prefix_chars="\0",
        add_help=False,
    )
    vllm.add_argument("vllm_arguments", nargs=argparse.REMAINDER)
    vllm.set_defaults(run=_vllm_serve)

    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, nargs="?", default=Path("config.yaml"), help="default: config.yaml"
    )
    parser.add_argument("--port", type=int, help="HTTP port instead of the configuration's")


def _add_proxy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="to listen on (8000)")
    for role in ("prefill", "decode"):
        parser.add_argument(
            f"--{role}",
            nargs="+",
            action="extend",
            default=[],
            metavar="URL",
            help=f"{role} servers; without it, those that etcd knows",
        )
    parser.add_argument(
        "--etcd",
        metavar="HOST:PORT",
        help="its members; else those that MOONCAKE_CONFIG_PATH names",
    )
    parser.add_argument(
        "--allowed-origin",
        nargs="+",
        action="extend",
        default=[],
        metavar="ORIGIN",
        help="origins whose pages may call from a browser; *: all (none)",
    )
    parser.add_argument(
        "--cluster", default="default", help="name of the cluster in etcd (default)"
    )
    for name, what in (
        ("ca", "authority of the workers' certificates, where these talk by TLS"),
        ("cert", "certificate to show them"),
        ("key", "key to it"),
    ):
        parser.add_argument(f"--tls-{name}", default="", metavar="FILE", help=what)
    parser.add_argument(
        "--tls-server-name",
        default="",
        metavar="NAME",
        help="that workers' certificates are for, if not their host",
    )


def _up(options: argparse.Namespace) -> int:
    from serve_app.launch.launcher import UpOptions, up

    return up(UpOptions(options.config, options.port, options.timeout, options.dashboard))


def _check(options: argparse.Namespace) -> int:
    from serve_app.launch.surroundings import check

    findings = list(check(options.config, options.port))
    for finding in findings:
        print(f"{finding.level:6}{finding.text}")
    return int(any(finding.level == "error" for finding in findings))


def _model(_options: argparse.Namespace) -> int:
    from serve_app.launch.demo_model import ModelError, ensure_demo_model

    try:
        folder = ensure_demo_model(print)
    except ModelError as error:
        return _fail(str(error))
    print(f"the demo model is in {folder}")
    return 0


def _proxy(options: argparse.Namespace) -> int:
    from serve_app.proxy.command import run
    from transfer.errors import TransferError

    try:
        run(options)
    except TransferError as error:
        return _fail(error.message)
    except OSError as error:
        return _fail(str(error))
    return 0


def _vllm_serve(options: argparse.Namespace) -> int:
    from serve_app.vllm_serve import vllm_serve
    from transfer.errors import ConfigurationError

    try:
        vllm_serve(options.vllm_arguments)
    except ConfigurationError as error:
        return _fail(error.message)


def _fail(message: str) -> int:
    print(f"baton: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
