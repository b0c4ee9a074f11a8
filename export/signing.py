"""Signatures of bundles: Ed25519 over bundle.json, which has the hashes of all other files.

bundle.sig is the signature's 64 bytes. Keys are PEM files, as openssl writes them:

    openssl genpkey -algorithm ed25519 -out private.pem
    openssl pkey -in private.pem -pubout -out public.pem
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from hrpro.export.bundle import MANIFEST, SIGNATURE, Bundle, BundleError, read_bundle


def sign_bundle(folder: Path, private_key: Path) -> Bundle:
    """Sign a bundle where it lies. Raises BundleError."""
    bundle = read_bundle(folder)
    try:
        key = load_pem_private_key(private_key.read_bytes(), password=None)
    except (OSError, TypeError, ValueError, UnsupportedAlgorithm) as error:
        raise BundleError(f"{private_key}: expected a private key in PEM: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise BundleError(f"{private_key}: expected an Ed25519 key, got {type(key).__name__}")
    (folder / SIGNATURE).write_bytes(key.sign((folder / MANIFEST).read_bytes()))
    return bundle


def read_trusted_bundle(folder: Path, public_key: Path) -> Bundle:
    """Read a bundle that must be signed by the owner of this key. Raises BundleError."""
    try:
        key = load_pem_public_key(public_key.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise BundleError(f"{public_key}: expected a public key in PEM: {error}") from None
    if not isinstance(key, Ed25519PublicKey):
        raise BundleError(f"{public_key}: expected an Ed25519 key, got {type(key).__name__}")
    path = folder / SIGNATURE
    try:
        manifest_bytes = (folder / MANIFEST).read_bytes()
        key.verify(path.read_bytes(), manifest_bytes)
    except OSError as error:
        raise BundleError(
            f"{error.filename}: {error.strerror}; expected a bundle signed by {public_key}"
        ) from None
    except InvalidSignature:
        raise BundleError(f"{path}: expected a signature by {public_key}, this is none") from None
    return read_bundle(folder, manifest_bytes)
