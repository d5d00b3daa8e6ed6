"""Certificates of the tests' own making."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM
PKCS8 = serialization.PrivateFormat.PKCS8


def self_signed(
    folder: Path, name: str, *, of: str = "localhost", san: Sequence[x509.GeneralName] = (), ca: bool | None = None
) -> tuple[Path, Path]:
    """Writes NAME.pem and NAME.key: a certificate that is valid for two days, and its key.

    Args:
        of: common name of whom it belongs to.
        san: names that it is valid for; none leaves that to the common name.
        ca: whether it may sign others; None leaves that unsaid.
    """
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, of)])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=2))
    if san:
        builder = builder.add_extension(x509.SubjectAlternativeName(san), critical=False)
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    certificate_path, key_path = folder / f"{name}.pem", folder / f"{name}.key"
    certificate_path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(PEM))
    key_path.write_bytes(key.private_bytes(PEM, PKCS8, serialization.NoEncryption()))
    return certificate_path, key_path


def lock(key_path: Path, locked_path: Path, password: str) -> None:
    """Writes a key again, behind a password."""
    key = serialization.load_pem_private_key(key_path.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(password.encode())
    locked_path.write_bytes(key.private_bytes(PEM, PKCS8, encryption))
