//! Both ends of the Unix socket: who listens, who connects, who is there.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener as StdListener;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::Message;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};

use terrace_proto::v1::{LaneRequest, LaneResponse};

use crate::error::LaneError;
use crate::frame::{LaneMessage, LaneReader, LaneWriter};
use crate::syscall;

/// Longest path of a Unix socket, in bytes (`sun_path` less its final zero).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Who is at the other end.
#[derive(Debug)]
pub struct PeerCredentials {
    /// Process id, as this process's pid namespace sees it; 0 if it cannot. Only for people.
    pub pid: u32,
    /// User id when the peer connected.
    pub uid: u32,
    /// Becomes readable when the peer's process ends. `None` if the kernel does not say which one that is.
    pub pidfd: Option<OwnedFd>,
}

impl PeerCredentials {
    /// Whether the peer runs as the same user as this process.
    pub fn is_same_user(&self) -> bool {
        self.uid == syscall::own_uid()
    }
}

/// Who may connect to a listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admits {
    /// Processes of the daemon's own user.
    Owner,
    /// And of its group.
    Group,
    /// Everybody on the machine.
    Everybody,
}

impl Admits {
    const fn mode(self) -> u32 {
        match self {
            Self::Owner => 0o600,
            Self::Group => 0o660,
            Self::Everybody => 0o666,
        }
    }
}

/// Tells when a process has ended.
#[derive(Debug)]
pub struct ProcessEnd(AsyncFd<OwnedFd>);

impl ProcessEnd {
    /// Watches [`PeerCredentials::pidfd`]. Call it inside a tokio runtime.
    /// `None` if the runtime cannot watch it; the socket still tells.
    pub fn watch(pidfd: OwnedFd) -> Option<Self> {
        // SAFETY: an owned descriptor stays the same open file for its whole life,
        // and AsyncFd deregisters it before it is closed.
        unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.ok().map(Self)
    }

    /// Returns when the process has ended. Cancel-safe.
    pub async fn ended(&self) {
        if self.0.readable().await.is_err() {
            // The runtime is shutting down, and with it whoever waits here.
            std::future::pending::<()>().await;
        }
    }
}

/// The daemon's listening socket. Its file is removed when it is dropped.
#[derive(Debug)]
pub struct LaneServer {
    listener: UnixListener,
    path: PathBuf,
    inode: Option<u64>,
}

impl LaneServer {
    /// Listens at `path`. A socket file that nobody answers on is
    /// replaced; anything else is left alone. Call it inside a tokio runtime.
    ///
    /// # Errors
    /// A path over [`SOCKET_PATH_BYTES_MAX`], a path in use, or what the kernel says.
    pub fn bind(path: &Path, admits: Admits) -> Result<Self, LaneError> {
        check_path(path)?;
        remove_stale(path)?;
        let failed = |source| LaneError::Socket { path: path.to_owned(), source };
        let socket = syscall::listen(path, admits.mode(), BACKLOG).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => LaneError::InUse { path: path.to_owned() },
            _ => failed(error),
        })?;
        let listener = UnixListener::from_std(StdListener::from(socket)).map_err(failed)?;
        let inode = std::fs::symlink_metadata(path).ok().map(|facts| facts.ino());
        Ok(Self { listener, path: path.to_owned(), inode })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next client. Cancel-safe.
    ///
    /// # Errors
    /// What the kernel says: out of descriptors, for example. Wait a little and try again.
    pub async fn accept(&self) -> Result<LaneConnection<LaneRequest, LaneResponse>, LaneError> {
        let (stream, _) = self.listener.accept().await?;
        LaneConnection::new(stream)
    }

    /// The next client's socket, for [`LaneConnection::from_stream`] in another runtime: a connection is told of what
    /// arrives by the runtime that it was made in. Cancel-safe.
    ///
    /// # Errors
    /// As of [`LaneServer::accept`].
    pub async fn accept_stream(&self) -> Result<StdStream, LaneError> {
        let (stream, _) = self.listener.accept().await?;
        Ok(stream.into_std()?)
    }
}

impl Drop for LaneServer {
    fn drop(&mut self) {
        // Only our own file: another daemon may have replaced it.
        let found = std::fs::symlink_metadata(&self.path).ok().map(|facts| facts.ino());
        if found.is_some()
            && found == self.inode
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "lane socket file stays behind");
        }
    }
}

/// One connection, which receives `I` and sends `O`.
#[derive(Debug)]
pub struct LaneConnection<I, O> {
    peer: PeerCredentials,
    stream: Arc<UnixStream>,
    kind: PhantomData<fn(O) -> I>,
}

impl LaneConnection<LaneResponse, LaneRequest> {
    /// Connects to a daemon. Cancel-safe.
    ///
    /// # Errors
    /// A path over [`SOCKET_PATH_BYTES_MAX`], or what the kernel says.
    pub async fn connect(path: &Path) -> Result<Self, LaneError> {
        check_path(path)?;
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| LaneError::Socket { path: path.to_owned(), source })?;
        Self::new(stream)
    }
}

impl<I: LaneMessage, O: LaneMessage + Message> LaneConnection<I, O> {
    fn new(stream: UnixStream) -> Result<Self, LaneError> {
        let facts = stream.peer_cred()?;
        let pid = facts.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
        let pidfd = syscall::peer_pidfd(stream.as_fd()).or_else(|| syscall::pidfd_of(pid));
        Ok(Self {
            peer: PeerCredentials { pid, uid: facts.uid(), pidfd },
            stream: Arc::new(stream),
            kind: PhantomData,
        })
    }

    /// A connection over a socket that exists already, for example one end of a
    /// socket pair. Call it inside a tokio runtime.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn from_stream(stream: StdStream) -> Result<Self, LaneError> {
        stream.set_nonblocking(true)?;
        Self::new(UnixStream::from_std(stream)?)
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &PeerCredentials {
        &self.peer
    }

    /// The two halves. The socket closes when both are gone.
    pub fn split(self) -> (PeerCredentials, LaneReader<I>, LaneWriter<O>) {
        let reader = LaneReader::new(Arc::clone(&self.stream));
        (self.peer, reader, LaneWriter::new(self.stream))
    }
}

fn check_path(path: &Path) -> Result<(), LaneError> {
    let found = path.as_os_str().as_bytes().len();
    if found > SOCKET_PATH_BYTES_MAX {
        return Err(LaneError::PathTooLong { path: path.to_owned(), found, limit: SOCKET_PATH_BYTES_MAX });
    }
    Ok(())
}

/// Removes a socket file that nobody answers on.
fn remove_stale(path: &Path) -> Result<(), LaneError> {
    let failed = |source| LaneError::Socket { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(facts) if !facts.file_type().is_socket() => {
            return Err(LaneError::NotASocket { path: path.to_owned() });
        }
        Ok(_) => {}
    }
    match StdStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "removing a lane socket that nobody answers on");
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
                Ok(()) | Err(_) => Ok(()),
            }
        }
        // It went away meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(_) => Err(LaneError::InUse { path: path.to_owned() }),
    }
}

#[cfg(test)]
mod tests;
