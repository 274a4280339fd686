//! One connection: the handshake, and messages after it.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};

use super::address::Stream;
use super::frame::{self, COMMAND, Command, GREETING_BYTES, LONG, MORE};
use super::{FRAMES_MAX, Kind, LinkError, MESSAGE_BYTES_MAX, Message};

/// Longest command; the longest we know is a subscription.
const COMMAND_BYTES_MAX: usize = 4096;
/// How long a peer may take to introduce itself.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a peer may take for a message that it has begun.
const MESSAGE_TIME_MAX: Duration = Duration::from_secs(30);

/// What a peer sent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Message(Message),
    /// By a command, or by the message that stands for one where the peer subscribes so.
    Subscribe(Bytes),
    Cancel(Bytes),
    /// To be answered, whatever else is sent: who hears nothing for a while takes the link for dead.
    Ping {
        pong: BytesMut,
    },
}

/// The half that reads. A call that is dropped in the middle leaves it of no use.
pub(crate) struct Reader {
    stream: BufReader<ReadHalf<Box<dyn Stream>>>,
    kind: Kind,
}

/// The half that writes.
pub(crate) struct Writer {
    stream: WriteHalf<Box<dyn Stream>>,
}

/// Introduces both to each other.
pub(crate) async fn open(stream: Box<dyn Stream>, kind: Kind) -> Result<(Reader, Writer), LinkError> {
    let (read, write) = tokio::io::split(stream);
    let mut reader = Reader { stream: BufReader::with_capacity(64 << 10, read), kind };
    let mut writer = Writer { stream: write };
    let introduced = async {
        let mut ours = BytesMut::from(&frame::greeting()[..]);
        frame::put_ready(&mut ours, kind);
        writer.stream.write_all(&ours).await?;
        let mut theirs = [0; GREETING_BYTES];
        reader.stream.read_exact(&mut theirs).await?;
        frame::check_greeting(&theirs)?;
        reader.ready().await
    };
    tokio::time::timeout(HANDSHAKE_TIME_MAX, introduced).await.map_err(|_| LinkError::Silent)??;
    Ok((reader, writer))
}

impl Reader {
    async fn ready(&mut self) -> Result<(), LinkError> {
        let (flags, body) = self.frame(COMMAND_BYTES_MAX).await?;
        if flags & COMMAND == 0 {
            return Err(LinkError::Peer("did not introduce itself"));
        }
        match frame::command(&body)? {
            Command::Ready(peer) if self.kind.takes(peer) => Ok(()),
            Command::Ready(_) => Err(LinkError::Peer("is a socket of a kind that we cannot talk to")),
            Command::Error => Err(LinkError::Peer("refuses us")),
            _ => Err(LinkError::Peer("did not introduce itself")),
        }
    }

    /// What comes next.
    pub(crate) async fn next(&mut self) -> Result<Sent, LinkError> {
        loop {
            // Waiting for a message may take for ever; the rest of it may not.
            let flags = self.stream.read_u8().await?;
            let rest = tokio::time::timeout(MESSAGE_TIME_MAX, self.rest(flags)).await;
            if let Some(sent) = rest.map_err(|_| LinkError::Silent)?? {
                return Ok(sent);
            }
        }
    }

    /// None for a command that asks for nothing of ours.
    async fn rest(&mut self, mut flags: u8) -> Result<Option<Sent>, LinkError> {
        let (mut message, mut bytes) = (Message::new(), 0);
        loop {
            if flags & COMMAND != 0 {
                let body = self.body(flags, COMMAND_BYTES_MAX).await?;
                let sent = match frame::command(&body)? {
                    Command::Subscribe(topic) => Some(Sent::Subscribe(body.slice_ref(topic))),
                    Command::Cancel(topic) => Some(Sent::Cancel(body.slice_ref(topic))),
                    Command::Error => return Err(LinkError::Peer("refuses us")),
                    Command::Ping(context) => {
                        let mut pong = BytesMut::new();
                        frame::put_pong(&mut pong, context);
                        Some(Sent::Ping { pong })
                    }
                    Command::Ready(_) | Command::Other => None,
                };
                if !message.is_empty() {
                    return Err(LinkError::Peer("sent a command in the middle of a message"));
                }
                return Ok(sent);
            }
            let body = self.body(flags, MESSAGE_BYTES_MAX - bytes).await?;
            bytes += body.len();
            message.push(body);
            if flags & MORE == 0 {
                return Ok(Some(self.meaning(message)));
            }
            if message.len() == FRAMES_MAX {
                return Err(LinkError::Peer("sent a message of too many frames"));
            }
            flags = self.stream.read_u8().await?;
        }
    }

    /// To a publisher, messages are subscriptions.
    fn meaning(&self, message: Message) -> Sent {
        match (self.kind, message[0].first()) {
            (Kind::Pub, Some(1)) => Sent::Subscribe(message[0].slice(1..)),
            (Kind::Pub, Some(0)) => Sent::Cancel(message[0].slice(1..)),
            _ => Sent::Message(message),
        }
    }

    async fn frame(&mut self, limit: usize) -> Result<(u8, Bytes), LinkError> {
        let flags = self.stream.read_u8().await?;
        Ok((flags, self.body(flags, limit).await?))
    }

    /// The length and the body. Grows with what has come, not with what was announced.
    async fn body(&mut self, flags: u8, limit: usize) -> Result<Bytes, LinkError> {
        if flags & !(MORE | LONG | COMMAND) != 0 {
            return Err(LinkError::Peer("sent a frame with flags that ZMTP does not have"));
        }
        let length = if flags & LONG == 0 {
            u64::from(self.stream.read_u8().await?)
        } else {
            self.stream.read_u64().await?
        };
        if length > limit as u64 {
            return Err(LinkError::TooLong);
        }
        let mut body = Vec::new();
        (&mut self.stream).take(length).read_to_end(&mut body).await?;
        if (body.len() as u64) < length {
            return Err(LinkError::Io(std::io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(body.into())
    }
}

impl Writer {
    /// Sends bytes of [`frame`].
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        Ok(self.stream.write_all(bytes).await?)
    }

    /// Sends a message.
    pub(crate) async fn send_message(&mut self, message: &[Bytes]) -> Result<(), LinkError> {
        let mut bytes = BytesMut::new();
        frame::put_message(&mut bytes, message);
        self.send(&bytes).await
    }

    /// Subscribes to what begins with `topic`.
    pub(crate) async fn subscribe(&mut self, topic: &[u8]) -> Result<(), LinkError> {
        let body: Bytes = [&[1], topic].concat().into();
        self.send_message(&[body]).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pair(ours: Kind, theirs: Kind) -> Result<(Reader, Writer, Reader, Writer), LinkError> {
        let (one, two) = tokio::io::duplex(1 << 20);
        let (one, two) = tokio::join!(open(Box::new(one), ours), open(Box::new(two), theirs));
        let ((read, write), (other_read, other_write)) = (one?, two?);
        Ok((read, write, other_read, other_write))
    }

    /// Frames could lose their borders or a subscription its topic: messages of all sizes go there and come whole.
    #[tokio::test]
    async fn messages_and_subscriptions_arrive_as_they_were() {
        let (mut read, mut write, mut far, mut far_write) = pair(Kind::Sub, Kind::Pub).await.unwrap();
        write.subscribe(b"kv@").await.unwrap();
        assert_eq!(far.next().await.unwrap(), Sent::Subscribe(Bytes::from_static(b"kv@")));
        for length in [0, 1, 255, 256, 300_000] {
            let message = vec![Bytes::from_static(b"kv@"), Bytes::from(vec![7; length])];
            far_write.send_message(&message).await.unwrap();
            assert_eq!(read.next().await.unwrap(), Sent::Message(message));
        }
        // A ping is said at once, though nothing follows.
        let mut ping = BytesMut::new();
        frame::put_frame(&mut ping, COMMAND, b"\x04PING\0\x01hi");
        far_write.send(&ping).await.unwrap();
        let pong = BytesMut::from(&b"\x04\x07\x04PONGhi"[..]);
        assert_eq!(read.next().await.unwrap(), Sent::Ping { pong });
    }

    /// A peer that announces more than we take, or flags that do not exist, would make us allocate or misread: it is
    /// refused by its header alone. So is a socket of a kind that does not fit.
    #[tokio::test]
    async fn what_is_too_long_or_no_frame_ends_the_link() {
        for (bytes, wanted) in [
            (&[LONG, 0, 0, 0, 0, 1, 0, 0, 1][..], "more than"),
            (&[LONG, 255, 255, 255, 255, 255, 255, 255, 255], "more than"),
            (&[COMMAND | LONG, 0, 0, 0, 0, 0, 1, 0, 0], "more than"),
            (&[8, 0], "flags"),
            (&[COMMAND, 1, 9], "ends in the middle"),
            (&[MORE, 0, COMMAND, 2, 1, b'A'], "in the middle of a message"),
        ] {
            let (mut read, _write, _far, mut far_write) = pair(Kind::Sub, Kind::Pub).await.unwrap();
            far_write.send(bytes).await.unwrap();
            let error = read.next().await.unwrap_err().to_string();
            assert!(error.contains(wanted), "{bytes:?}: {error}");
        }
        let head = [MORE | LONG, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff];
        let two_big = [&head[..], &vec![0; 0xff_ffff], &[0, 2, 1, 1]].concat();
        let (mut read, _write, _far, mut far_write) = pair(Kind::Sub, Kind::Pub).await.unwrap();
        let sent = tokio::spawn(async move { far_write.send(&two_big).await });
        assert!(matches!(read.next().await, Err(LinkError::TooLong)), "frames count together");
        drop(read);
        let _ = sent.await;
        assert!(matches!(pair(Kind::Sub, Kind::Sub).await, Err(LinkError::Peer(_))));
    }
}
