//! Connections of a TCP listener: counted, limited, and given up when their peer says nothing.
//!
//! Whoever comes when all are taken is refused at once: a client that waited in the kernel's queue instead would hear nothing.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::serve::Listener;
use prometheus::{IntCounter, IntGauge};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tonic::transport::server::{Connected, TcpConnectInfo};

/// What a client of HTTP/2 says first has so many bytes.
const PREFACE_BYTES: usize = 24;
/// Pause after a connection that could not be accepted: an error that stays (no more open files) would cost a processor.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// For how long a peer may say nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Patience {
    /// Until it has said that it speaks HTTP/2, whose pings find out later whether it is there.
    Greeting(Duration),
    /// At any time.
    Idle(Duration),
}

/// What a listener's connections are counted by.
#[derive(Clone)]
pub(crate) struct Counts {
    pub(crate) open: IntGauge,
    pub(crate) refused: IntCounter,
    /// For their peer said nothing.
    pub(crate) given_up: IntCounter,
}

/// Lets connections in while there is room.
pub(crate) struct Gate {
    listener: &'static str,
    room: Arc<Semaphore>,
    patience: Patience,
    counts: Counts,
    /// Said, and nobody was let in since.
    is_full: AtomicBool,
}

impl Gate {
    /// A gate for `most` connections at a time. `listener` is the configuration key of its address.
    pub(crate) fn new(listener: &'static str, most: usize, patience: Patience, counts: Counts) -> Self {
        let room = Arc::new(Semaphore::new(most));
        Self { listener, room, patience, counts, is_full: AtomicBool::new(false) }
    }

    /// `None`: there was no room, and the peer finds its connection closed.
    pub(crate) fn admit(&self, stream: TcpStream) -> Option<Connection> {
        let Ok(place) = Arc::clone(&self.room).try_acquire_owned() else {
            self.counts.refused.inc();
            if !self.is_full.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    listener = self.listener,
                    "connections are refused: `limits.connections` are open"
                );
            }
            return None;
        };
        self.is_full.store(false, Ordering::Relaxed);
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "small messages of a connection may wait");
        }
        self.counts.open.inc();
        let watch = match self.patience {
            Patience::Greeting(time) => Watch::Greeting { bytes: PREFACE_BYTES, ends: wait(time) },
            Patience::Idle(time) => Watch::Idle { time, ends: wait(time) },
        };
        Some(Connection { stream, watch, counts: self.counts.clone(), _place: place })
    }
}

fn wait(time: Duration) -> Pin<Box<Sleep>> {
    Box::pin(tokio::time::sleep(time))
}

/// A listener with a gate.
pub(crate) struct Gated {
    pub(crate) listener: TcpListener,
    pub(crate) gate: Gate,
}

impl Listener for Gated {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, peer)) => {
                    if let Some(connection) = self.gate.admit(stream) {
                        return (connection, peer);
                    }
                }
                Err(error) => {
                    tracing::warn!(listener = self.gate.listener, %error, "cannot accept");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that was let in. Its place is free when it is dropped.
pub(crate) struct Connection {
    stream: TcpStream,
    watch: Watch,
    counts: Counts,
    _place: OwnedSemaphorePermit,
}

enum Watch {
    /// So many bytes are to come until then.
    Greeting {
        bytes: usize,
        ends: Pin<Box<Sleep>>,
    },
    /// Something is to move until then.
    Idle {
        time: Duration,
        ends: Pin<Box<Sleep>>,
    },
    Greeted,
    GivenUp,
}

impl Connection {
    /// So many bytes came, or went.
    fn moved(&mut self, count: usize) {
        match &mut self.watch {
            Watch::Greeting { bytes, .. } if *bytes > count => *bytes -= count,
            Watch::Greeting { .. } => self.watch = Watch::Greeted,
            Watch::Idle { time, ends } => ends.as_mut().reset(Instant::now() + *time),
            Watch::Greeted | Watch::GivenUp => {}
        }
    }

    /// Nothing moves: an error when it has been so for too long.
    fn waits<T>(&mut self, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        match &mut self.watch {
            Watch::Greeting { ends, .. } | Watch::Idle { ends, .. } => {
                ready!(ends.as_mut().poll(context));
                self.counts.given_up.inc();
                self.watch = Watch::GivenUp;
            }
            Watch::Greeted => return Poll::Pending,
            Watch::GivenUp => {}
        }
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    /// What went is a sign of life where a peer may be idle, and no greeting. While nothing goes, the server reads.
    fn wrote(&mut self, wrote: &Poll<io::Result<usize>>) {
        if let (Poll::Ready(Ok(count)), Watch::Idle { .. }) = (wrote, &self.watch) {
            self.moved(*count);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.counts.open.dec();
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let connection = self.get_mut();
        let before = buffer.filled().len();
        match Pin::new(&mut connection.stream).poll_read(context, buffer) {
            Poll::Ready(read) => {
                connection.moved(buffer.filled().len() - before);
                Poll::Ready(read)
            }
            Poll::Pending => connection.waits(context),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let connection = self.get_mut();
        let wrote = Pin::new(&mut connection.stream).poll_write(context, bytes);
        connection.wrote(&wrote);
        wrote
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let connection = self.get_mut();
        let wrote = Pin::new(&mut connection.stream).poll_write_vectored(context, bytes);
        connection.wrote(&wrote);
        wrote
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test ends there, and says where")]
mod tests {
    use axum::Router;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const IDLE: Duration = Duration::from_millis(300);
    const PATIENCE: Duration = Duration::from_secs(30);
    const ANSWER_BYTES: usize = 64 << 20;

    /// A server whose connections may be idle for so long.
    async fn server() -> (SocketAddr, Counts) {
        let counts = Counts {
            open: IntGauge::new("open", "open").unwrap(),
            refused: IntCounter::new("refused", "refused").unwrap(),
            given_up: IntCounter::new("given_up", "given up").unwrap(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let gate = Gate::new("test", 4, Patience::Idle(IDLE), counts.clone());
        let large = get(async || vec![b'x'; ANSWER_BYTES]);
        let router = Router::new().route("/", get(async || "here")).route("/large", large);
        tokio::spawn(async move { axum::serve(Gated { listener, gate }, router).await });
        (address, counts)
    }

    async fn all_are_gone(counts: &Counts) {
        let began = Instant::now();
        while counts.open.get() > 0 {
            assert!(began.elapsed() < PATIENCE, "a silent peer keeps its connection");
            tokio::task::yield_now().await;
        }
    }

    /// A peer that asks again and again keeps its connection for longer than it may be idle, and one that then asks
    /// nothing is given up; so is one that never asked.
    #[tokio::test]
    async fn who_asks_nothing_is_given_up() {
        let (address, counts) = server().await;
        let mut never = TcpStream::connect(address).await.unwrap();
        let mut stream = TcpStream::connect(address).await.unwrap();
        let began = Instant::now();
        while began.elapsed() < IDLE * 3 {
            stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
            let mut answer = Vec::new();
            while !answer.ends_with(b"here") {
                assert!(stream.read_buf(&mut answer).await.unwrap() > 0, "it is given up while it asks");
            }
        }
        assert_eq!(counts.given_up.get(), 1, "the one that never asked");
        assert_eq!(never.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(tokio::time::timeout(PATIENCE, stream.read(&mut [0])).await.unwrap().unwrap(), 0);
        all_are_gone(&counts).await;
        assert_eq!(counts.given_up.get(), 2);
    }

    /// A peer asks for much and takes none of it: its answer must not be kept for ever. One that takes it has all of it.
    #[tokio::test]
    async fn who_takes_no_answer_is_given_up() {
        let (address, counts) = server().await;
        let ask = b"GET /large HTTP/1.0\r\n\r\n";
        let mut idle = TcpStream::connect(address).await.unwrap();
        idle.write_all(ask).await.unwrap();
        let mut quick = TcpStream::connect(address).await.unwrap();
        quick.write_all(ask).await.unwrap();
        let mut answer = Vec::new();
        quick.read_to_end(&mut answer).await.unwrap();
        assert!(answer.len() > ANSWER_BYTES, "{} bytes", answer.len());
        all_are_gone(&counts).await;
        assert_eq!(counts.given_up.get(), 1);
    }
}
