//! Where a connection leads: `tcp://HOST:PORT` or `ipc:///PATH`.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::str::FromStr;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// A ZeroMQ endpoint.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Address {
    /// A host with a port.
    Tcp(String),
    /// A socket in the file system.
    Ipc(PathBuf),
}

/// A text that is no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{found}` is no endpoint; write it like tcp://127.0.0.1:5557 or ipc:///run/kv.sock")]
pub struct BadAddress {
    found: String,
}

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let bad = || BadAddress { found: text.to_owned() };
        if let Some(path) = text.strip_prefix("ipc://") {
            return if path.starts_with('/') { Ok(Self::Ipc(path.into())) } else { Err(bad()) };
        }
        let host = text.strip_prefix("tcp://").ok_or_else(bad)?;
        let (name, port) = host.rsplit_once(':').ok_or_else(bad)?;
        if name.is_empty() || name == "*" || port.parse::<u16>().is_err() {
            return Err(bad());
        }
        Ok(Self::Tcp(host.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host) => write!(f, "tcp://{host}"),
            Self::Ipc(path) => write!(f, "ipc://{}", path.display()),
        }
    }
}

/// Bytes in both directions.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Address {
    /// Whether nobody on another machine can come in by it. A name counts as another machine's.
    pub(crate) fn is_local(&self) -> bool {
        match self {
            Self::Tcp(host) => host.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_loopback()),
            Self::Ipc(_) => true,
        }
    }

    /// A new connection.
    pub(crate) async fn connect(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Self::Tcp(host) => {
                let stream = TcpStream::connect(host).await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
            Self::Ipc(path) => Ok(Box::new(UnixStream::connect(path).await?)),
        }
    }

    /// Takes connections. A socket in the file system that an earlier life left is replaced.
    pub(crate) async fn listen(&self) -> io::Result<Listener> {
        match self {
            Self::Tcp(host) => Ok(Listener::Tcp(TcpListener::bind(host).await?)),
            Self::Ipc(path) => {
                let is_socket = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_socket());
                if is_socket && UnixStream::connect(path).await.is_err() {
                    std::fs::remove_file(path)?;
                }
                Ok(Listener::Unix(UnixListener::bind(path)?))
            }
        }
    }
}

/// Takes connections.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// The next connection. May be dropped at any time.
    pub(crate) async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
            Self::Unix(listener) => Ok(Box::new(listener.accept().await?.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An endpoint that is misread would be connected to for ever: what is none must be refused, and what may
    /// not be listened on told apart.
    #[test]
    fn endpoints_are_read_and_shown() {
        for text in ["tcp://127.0.0.1:5557", "tcp://[::1]:1", "tcp://node-7:80", "ipc:///run/kv.sock"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in
            ["127.0.0.1:1", "tcp://*:5557", "tcp://a", "tcp://:1", "tcp://a:x", "ipc://kv", "inproc://a"]
        {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
        let is_local = |text: &str| text.parse::<Address>().unwrap().is_local();
        assert!(is_local("tcp://127.0.0.1:1") && is_local("tcp://[::1]:1") && is_local("ipc:///a"));
        assert!(!is_local("tcp://0.0.0.0:1") && !is_local("tcp://node-7:80"));
    }
}
