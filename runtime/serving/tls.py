"""Certificates."""

from __future__ import annotations

import ssl
from contextlib import suppress
from pathlib import Path

from ssv.support.errors import UserError


def certificate_name(certificate: Path, key: Path) -> str:
    """A name that a certificate is valid for, found by shaking hands with it.

    Raises:
        UserError: files that cannot be used, are not a certificate and its key, or a certificate without a name.
    """
    server_side, client_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_side.check_hostname = False
    client_side.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is trusted, whoever signed it
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        server_side.load_cert_chain(certificate, key, password=lambda: "")  # never asked for
        client_side.load_verify_locations(certificate)
        client = client_side.wrap_bio(to_client, to_server)
        server = server_side.wrap_bio(to_server, to_client, server_side=True)
        for _ in range(3):  # as often as messages go back and forth
            for side in (client, server):
                with suppress(ssl.SSLWantReadError):
                    side.do_handshake()
        names = (client.getpeercert() or {}).get("subjectAltName", ())
    except OSError as error:
        raise UserError(
            f"{certificate} and {key} cannot be used ({error})", "give a certificate and its key as PEM files"
        ) from error
    if not names:
        raise UserError(f"{certificate} has no name in subjectAltName", "give one that has, gRPC asks for it")
    return str(names[0][1]).replace("*", "ssv")
