//! The state directory of `terrace up`: who uses it, and where its parts are.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

/// Used when no `--home` is given.
pub(crate) const DEFAULT: &str = ".terrace";
/// Longest path that a Unix socket address holds.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// A log file above this size is set aside when a new run starts.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// What a running `terrace up` says about itself, in `DIR/terrace.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Running {
    /// Process id of `terrace up`.
    pub(crate) pid: u32,
    /// The OpenAI-compatible front door.
    pub(crate) url: String,
    /// The daemon's gRPC address.
    pub(crate) grpc: String,
    /// The daemon's lane socket.
    pub(crate) socket: PathBuf,
    /// The daemon's metrics page.
    pub(crate) daemon_metrics: String,
    /// The planner's metrics page.
    pub(crate) planner_metrics: String,
    /// The model that is served.
    pub(crate) model: PathBuf,
    /// Directory of the log files.
    pub(crate) logs: PathBuf,
}

impl Running {
    /// Reads what the run in `dir` wrote.
    ///
    /// # Errors
    /// When nothing runs there; says what to do.
    pub(crate) fn read(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("terrace.json");
        let text = fs::read_to_string(&path).with_context(|| {
            format!(
                "nothing runs in {}: start `terrace up`, or name --home DIR or --endpoint URL",
                dir.display()
            )
        })?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is damaged; start `terrace up` again", path.display()))
    }
}

/// A state directory, locked for this process.
#[derive(Debug)]
pub(crate) struct Home {
    /// Absolute path.
    pub(crate) dir: PathBuf,
    _lock: File,
}

impl Home {
    /// Creates `dir` where it is missing and locks it.
    ///
    /// # Errors
    /// When another process uses it (with its pid), or it cannot be written.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<Self> {
        for part in ["", "logs", "config", "data"] {
            let path = dir.join(part);
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.with_context(|| format!("cannot create {}; choose another --home", path.display()))?;
        }
        let dir = dir.canonicalize().with_context(|| format!("cannot find {}", dir.display()))?;
        let path = dir.join("up.lock");
        let mut lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                lock.read_to_string(&mut pid).unwrap_or_default();
                bail!(
                    "{} is in use by `terrace up` with pid {}: stop that one, or choose another --home",
                    dir.display(),
                    pid.trim()
                );
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        lock.set_len(0)?;
        lock.rewind()?;
        writeln!(lock, "{}", std::process::id())?;
        Ok(Self { dir, _lock: lock })
    }

    /// A path inside.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Where the lane socket goes: inside, unless that path is too long for a socket.
    ///
    /// # Errors
    /// When the substitute directory cannot be made or belongs to somebody else.
    pub(crate) fn socket(&self) -> anyhow::Result<PathBuf> {
        let inside = self.path("lane.sock");
        if inside.as_os_str().len() < SOCKET_PATH_BYTES_MAX {
            return Ok(inside);
        }
        let user = fs::metadata(&self.dir)?.uid();
        let base = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let dir = base.join(format!("terrace-{user}-{:016x}", path_hash(&self.dir)));
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("cannot create {}", dir.display())),
        }
        let found = fs::symlink_metadata(&dir)?;
        if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
            bail!(
                "{} is not a private directory of this user: remove it, or choose a shorter --home",
                dir.display()
            );
        }
        let socket = dir.join("lane.sock");
        if socket.as_os_str().len() >= SOCKET_PATH_BYTES_MAX {
            bail!("{} is too long for a socket: choose a shorter --home", socket.display());
        }
        println!("{} is too long for a socket, so the lane socket is {}", inside.display(), socket.display());
        Ok(socket)
    }

    /// Opens a log file for appending; a large one is set aside first.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn log(&self, name: &str) -> anyhow::Result<(PathBuf, File)> {
        let path = self.dir.join("logs").join(format!("{name}.log"));
        if fs::metadata(&path).is_ok_and(|found| found.len() > LOG_BYTES_MAX) {
            fs::rename(&path, path.with_extension("log.old"))?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        Ok((path, file))
    }

    /// Says to other commands where everything is.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn publish(&self, running: &Running) -> anyhow::Result<()> {
        let (path, part) = (self.path("terrace.json"), self.path("terrace.json.part"));
        fs::write(&part, serde_json::to_vec_pretty(running)?)?;
        fs::rename(&part, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Takes that back.
    pub(crate) fn unpublish(&self) {
        // Gone already is just as well.
        fs::remove_file(self.path("terrace.json")).unwrap_or_default();
    }
}

/// A short name for a long path (FNV-1a). Collisions are told apart by the owner
/// check and by the daemon, which does not take over a socket that answers.
fn path_hash(path: &Path) -> u64 {
    let bytes = path.as_os_str().as_encoded_bytes();
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two runs on one directory would fight over its files: the second must be
    /// refused with the pid of the first.
    #[test]
    fn a_home_in_use_is_refused_with_the_pid() {
        let dir = tempfile::tempdir().unwrap();
        let first = Home::open(dir.path()).unwrap();
        let error = Home::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(first);
        Home::open(dir.path()).unwrap();
    }

    /// A deep home would give a socket path that no kernel takes.
    #[test]
    fn a_long_home_gets_a_short_socket() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(&dir.path().join("d".repeat(120))).unwrap();
        let socket = home.socket().unwrap();
        assert!(socket.as_os_str().len() < SOCKET_PATH_BYTES_MAX);
        assert!(socket.parent().unwrap().is_dir());
        fs::remove_dir(socket.parent().unwrap()).unwrap();
    }
}
