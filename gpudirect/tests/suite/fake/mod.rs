//! Libraries that stand in for NVIDIA's, built here from C, so that the code
//! that calls them really runs. A part of a test that needs them runs in a
//! process of its own: libraries are found by the loader's path.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

const PART: &str = "TERRACE_TEST_PART";
const FAULTS: &str = "FAKE_CUDA";

/// A folder for what tests make. The program may run where it was not built.
pub(crate) fn scratch() -> PathBuf {
    let built_here = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let elsewhere = || std::env::temp_dir().join("terrace-gpudirect-tests");
    if built_here.is_dir() { built_here.to_owned() } else { elsewhere() }
}

/// A folder with the libraries, built once; `None` where there is no C compiler.
fn built(name: &str, source: &str, library_name: &str, options: &[&str]) -> Option<PathBuf> {
    let folder = scratch().join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let text = if source == "cuda.c" { include_str!("cuda.c") } else { include_str!("cufile.c") };
    let source = folder.join(source);
    let next = source.with_extension(std::process::id().to_string());
    std::fs::write(&next, text).unwrap();
    std::fs::rename(next, &source).unwrap();
    let library = folder.join(format!("{library_name}-{}", std::process::id()));
    let mut compiler = Command::new("cc");
    compiler
        .args(["-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-o"])
        .arg(&library)
        .arg(source)
        .args(options);
    match compiler.arg("-lpthread").status() {
        Ok(status) => {
            assert!(status.success(), "the stand-in for a library does not compile");
            // In one step, because another run of the tests may be loading it.
            std::fs::rename(library, folder.join(library_name)).unwrap();
            Some(folder)
        }
        Err(error) => {
            eprintln!("skipped: no C compiler ({error}), so what calls CUDA is not tested over stand-ins");
            None
        }
    }
}

/// The whole driver.
fn driver() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    BUILT.get_or_init(|| built("fake-cuda", "cuda.c", "libcuda.so", &[])).as_deref()
}

/// One without a function that is needed.
fn old_driver() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    BUILT
        .get_or_init(|| built("fake-cuda-old", "cuda.c", "libcuda.so", &["-DcuMemCreate=cuMemCreate_later"]))
        .as_deref()
}

/// cuFile, for parts whose names begin with "files".
fn cufile() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    BUILT.get_or_init(|| built("fake-cufile", "cufile.c", "libcufile.so.0", &[])).as_deref()
}

/// One before 1.7, for parts whose names begin with "files-old".
fn old_cufile() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let options = ["-DcuFileReadAsync=cuFileReadAsync_later"];
    BUILT.get_or_init(|| built("fake-cufile-old", "cufile.c", "libcufile.so.0", &options)).as_deref()
}

/// Which driver a part finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driver {
    Fake,
    WithoutMemCreate,
    /// What the machine has.
    Real,
}

/// This program again, to run one part of one test.
pub(crate) fn command(test: &str, part: &str, driver_kind: Driver) -> Option<Command> {
    let folder = match driver_kind {
        Driver::Fake => driver()?,
        Driver::WithoutMemCreate => old_driver()?,
        Driver::Real => {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", test, "--nocapture"]).env(PART, part).stdin(Stdio::null());
            return Some(command);
        }
    };
    let mut command = Command::new(std::env::current_exe().unwrap());
    let faults = folder.join(format!("faults-{part}-{}", std::process::id()));
    std::fs::write(&faults, "").unwrap();
    command.args(["--exact", test, "--nocapture"]).env(PART, part).env(FAULTS, faults);
    let mut folders = folder.as_os_str().to_owned();
    if part.starts_with("files") {
        folders.push(":");
        folders.push(if part.starts_with("files-old") { old_cufile()? } else { cufile()? });
    }
    command.env("LD_LIBRARY_PATH", folders).env("CUFILE_LOGFILE_PATH", folder.join("cufile.log"));
    command.stdin(Stdio::null());
    Some(command)
}

/// Runs one part to its end, and shows what it said if it failed.
pub(crate) fn run(test: &str, part: &str, driver: Driver) {
    let Some(mut command) = command(test, part, driver) else { return };
    let output = command.output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "part {part}: {}\n{said}", output.status);
    assert!(said.contains(&format!("part {part} ran")), "part {part} did not run:\n{said}");
}

/// The part that this process is to run.
pub(crate) fn part() -> Option<String> {
    std::env::var(PART).ok()
}

/// Says that it ran, for [`run`].
pub(crate) fn ran(part: &str) {
    println!("part {part} ran");
}

/// What goes wrong from now on, in this process; "" is nothing.
pub(crate) fn faults(words: &str) {
    // In one step: an empty file for a moment would be a moment without faults.
    let path = std::env::var(FAULTS).unwrap();
    let next = format!("{path}.next");
    std::fs::write(&next, words).unwrap();
    std::fs::rename(next, path).unwrap();
}

/// A child that is killed when the test ends.
pub(crate) struct Killed(pub(crate) Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
