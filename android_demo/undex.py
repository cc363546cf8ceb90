"""Turns dex back into classes, so that a JVM can run what a phone would.

    PYTHONPATH=ENJARIFY python -O android_demo/undex.py DEX_OR_APK JAR

Does so with enjarify, whose classes are those of Java 5. Methods with code in interfaces came with
Java 8: classes get its version, and calls of such methods the kind of reference that Java wants for
them. A JVM must not verify these classes, and they have no annotations.
"""

import sys
import zipfile
from pathlib import Path

from enjarify import flags
from enjarify.jvm.constantpool import ConstantPoolBase
from enjarify.jvm.optimization import options
from enjarify.main import translate, writeToJar
from enjarify.parsedex import DexFile

_JAVA_8 = (52).to_bytes(2, "big")


def undex(dex: bytes) -> dict[str, bytes]:
    """The classes by their files' names. Exits if one can't be translated."""
    interfaces = {c.name for c in DexFile(dex).classes if c.access & flags.ACC_INTERFACE}
    plain = ConstantPoolBase.method
    ConstantPoolBase.method = lambda pool, called: (
        pool.imethod(called) if called[0] in interfaces else plain(pool, called)
    )
    try:
        classes, errors = translate(dex, options.NONE)
    finally:
        ConstantPoolBase.method = plain
    if errors:
        sys.exit(f"{len(errors)} classes can't be translated, {next(iter(errors))} first")
    return {name: code[:6] + _JAVA_8 + code[8:] for name, code in classes.items()}


def main(source: Path, jar: Path) -> None:
    if source.suffix == ".apk":
        with zipfile.ZipFile(source) as apk:
            files = [apk.read(name) for name in apk.namelist() if name.endswith(".dex")]
    else:
        files = [source.read_bytes()]
    classes: dict[str, bytes] = {}
    for dex in files:
        classes |= undex(dex)
    writeToJar(jar, classes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
