//! Files that past versions wrote, for tests: what they hold stays readable for ever, and what is written today
//! has the same bytes.
//!
//! A new file is added by running the tests once with `TERRACE_WRITE_GOLDEN=1`. One that is there is never written.

use std::path::Path;

/// The bytes of a golden file. `today` is what this version would write into it.
///
/// # Panics
/// If there is no such file.
pub(crate) fn golden(name: &str, today: &[u8]) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if !path.exists() && std::env::var_os("TERRACE_WRITE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, today).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
