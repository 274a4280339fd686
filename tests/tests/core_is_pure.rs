//! The core and the index decide and do nothing else: no I/O, no async, no clock, no randomness, no threads.
//!
//! Their clippy.toml bans the calls; this file watches what they are built from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every crate that terrace-core may be built from. Hashing, checksums, one hash table, one derive
/// macro and what those need at compile time. A new name here is a design decision.
const CRATES_ALLOWED: &[&str] = &[
    "terrace-core",
    // BLAKE3 and what it detects processors and compares digests with.
    "blake3",
    "arrayvec",
    "cfg-if",
    "constant_time_eq",
    "cpufeatures",
    // The sealed checksum, with its trait and its table of constants.
    "crc-fast",
    "digest",
    "crypto-common",
    "generic-array",
    "typenum",
    "spin",
    // Reads processor features on aarch64; BLAKE3 calls nothing else of it.
    "libc",
    // The hash table that is keyed by our own bits.
    "hashbrown",
    // Error enums; the rest runs in the compiler.
    "thiserror",
    "thiserror-impl",
    "proc-macro2",
    "quote",
    "syn",
    "unicode-ident",
];

/// Every crate that terrace-index may be built from.
const INDEX_CRATES_ALLOWED: &[&str] = &[
    "terrace-index",
    // Engines' hashes: SHA-256 and XXH3.
    "sha2",
    "block-buffer",
    "cfg-if",
    "cpufeatures",
    "crypto-common",
    "digest",
    "generic-array",
    "typenum",
    "libc",
    "twox-hash",
    // Error enums; the rest runs in the compiler.
    "thiserror",
    "thiserror-impl",
    "proc-macro2",
    "quote",
    "syn",
    "unicode-ident",
];

/// Folders of the crates that are watched.
const FOLDERS: [&str; 2] = ["kvstore/core", "kvstore/index"];

/// Parts of std and of the language that act on the world.
const BANNED_IN_SOURCE: &[&str] = &[
    "std::fs",
    "std::net",
    "std::thread",
    "std::process",
    "std::env",
    "std::os",
    "std::time::Instant",
    "std::time::SystemTime",
    "async fn",
    "async move",
    ".await",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_owned()
}

/// Names of the crates in the output of `cargo tree --prefix none`.
fn crate_names(tree: &str) -> Vec<&str> {
    tree.lines().filter_map(|line| line.split_whitespace().next()).collect()
}

/// Panics if `package` is built from a crate that is not in `allowed`.
fn assert_built_from(package: &str, allowed: &[&str]) {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["tree", "--offline", "--locked", "-p", package, "-e", "normal", "--prefix", "none"])
        .current_dir(root())
        .output()
        .expect("cargo runs, it built this test");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo tree failed:\n{errors}");
    let tree = String::from_utf8_lossy(&output.stdout);
    let names = crate_names(&tree);
    assert!(names.contains(&package), "cargo tree did not show {package}:\n{tree}");
    let strangers: Vec<_> = names.iter().filter(|name| !allowed.contains(name)).collect();
    assert!(strangers.is_empty(), "{package} may not be built from {strangers:?}");
}

/// A dependency brings a clock, a socket or a random seed into the core, and one seed no longer replays a
/// run: we ask cargo what the core and the index are built from and accept known names only.
#[test]
fn the_core_is_built_from_known_crates() {
    assert_built_from("terrace-core", CRATES_ALLOWED);
    assert_built_from("terrace-index", INDEX_CRATES_ALLOWED);
}

/// A file of the core, or of the router's placement, opens a file or reads a clock under a name that
/// clippy's list does not know: we look for the modules of std that act on the world.
#[test]
fn the_core_names_nothing_that_acts() {
    let placement = root().join("router/src/place.rs");
    let text = fs::read_to_string(&placement).expect("the placement's source can be read");
    let mut found: Vec<_> =
        banned_lines(&text).map(|line| format!("{}: {line}", placement.display())).collect();
    let mut folders: Vec<_> = FOLDERS.iter().map(|folder| root().join(folder).join("src")).collect();
    folders.push(placement.with_extension(""));
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the core's sources can be read") {
            let path = entry.expect("an entry of the core's sources can be read").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("a source of the core is text");
                found.extend(banned_lines(&text).map(|line| format!("{}: {line}", path.display())));
            }
        }
    }
    assert!(found.is_empty(), "the core must not act:\n{}", found.join("\n"));
}

fn banned_lines(text: &str) -> impl Iterator<Item = &str> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.filter(|line| BANNED_IN_SOURCE.iter().any(|banned| line.contains(banned)))
}

/// Clippy reads the nearest clippy.toml only: the core's could lose its bans, or the shared settings.
#[test]
fn the_core_keeps_its_own_lints() {
    let shared = fs::read_to_string(root().join("clippy.toml")).expect("the shared lint settings exist");
    for folder in FOLDERS {
        let own = fs::read_to_string(root().join(folder).join("clippy.toml"))
            .expect("the crate's own lint settings exist");
        for line in shared.lines().filter(|line| line.contains('=')) {
            assert!(own.contains(line), "{folder}/clippy.toml lacks the shared setting `{line}`");
        }
        // Writers of the index take turns in a mutex; the core has one owner.
        let mutex = (folder == "kvstore/core").then_some("Mutex");
        for banned in ["Instant::now", "SystemTime::now", "thread::spawn", "HashMap", "HashSet"] {
            assert!(own.contains(banned), "{folder}/clippy.toml no longer bans {banned}");
        }
        assert!(mutex.is_none_or(|banned| own.contains(banned)), "{folder}/clippy.toml no longer bans Mutex");
    }
}

/// The check looks at the wrong words and lets everything pass: samples that must be caught.
#[test]
fn the_checks_catch_their_samples() {
    assert_eq!(crate_names("rand v0.9.0\nlibc v0.2.1 (*)\n"), ["rand", "libc"]);
    assert_eq!(banned_lines("use std::fs::File;\n// std::fs is banned\nlet x = 1;\n").count(), 1);
}
