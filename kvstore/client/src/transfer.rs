//! Whole blocks by value, over either transport. Every byte that comes out was
//! compared with its checksum in this process.

use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tonic::Code;

use terrace_core::{Checksum, Durability, SealOutcome};
use terrace_lane::fold;
use terrace_proto::v1::write_request::Part;
use terrace_proto::v1::{GrantOutcome, ReadRequest, ReadResponse, WriteHeader, WritePiece, WriteRequest};

use crate::convert::{durability_to_wire, parent_to_wire, seals_from_wire};
use crate::error::ClientError;
use crate::grpc::{ATTEMPTS_MAX, GrpcLink};
use crate::lease::{Outcome, millis};
use crate::put::Put;
use crate::read::ReadOptions;
use crate::session::{Backend, Session};
use crate::space::Space;

/// How long [`Session::read`] waits for blocks of slower tiers.
pub(crate) const READ_WAIT: Duration = Duration::from_secs(5);
/// How long [`Session::write`] waits for frames while the daemon is over a limit.
pub(crate) const WRITE_WAIT: Duration = Duration::from_secs(10);
const THROTTLED_DELAY: Duration = Duration::from_millis(20);
/// Bytes that one transfer pins at once.
const BATCH_BYTES: u64 = 32 << 20;
/// Bytes of one message of a write stream.
const PIECE_BYTES: usize = 1 << 20;
const PIECES_WAITING_MAX: usize = 4;

impl Session {
    /// Copies blocks out; `None` is a miss. Waits up to five seconds for blocks
    /// that come from a slower tier; what is not there by then is a miss.
    ///
    /// # Errors
    /// Bad keys; [`ClientError::Throttled`] if the daemon stays over a limit;
    /// the session has ended.
    pub async fn read(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
    ) -> Result<Vec<Option<Vec<u8>>>, ClientError> {
        self.read_within(space, keys, READ_WAIT).await
    }

    /// As [`Session::read`], waiting for `wait` at most.
    ///
    /// # Errors
    /// As [`Session::read`].
    pub async fn read_within(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        wait: Duration,
    ) -> Result<Vec<Option<Vec<u8>>>, ClientError> {
        let keys = self.keys(space, keys)?;
        let deadline = Instant::now() + wait;
        match &self.inner.backend {
            Backend::Grpc(link) => read_stream(link, space, &keys, wait).await,
            Backend::Lane(_) => {
                let mut found = Vec::with_capacity(keys.len());
                for batch in keys.chunks(batch_blocks(space)) {
                    found.extend(self.read_batch(space, batch, deadline).await?);
                }
                Ok(found)
            }
        }
    }

    async fn read_batch(
        &self,
        space: &Space,
        keys: &[Bytes],
        deadline: Instant,
    ) -> Result<Vec<Option<Vec<u8>>>, ClientError> {
        let bytes = block_bytes(space)?;
        let mut found = vec![None; keys.len()];
        let mut open: Vec<usize> = (0..keys.len()).collect();
        loop {
            let wanted: Vec<&Bytes> = open.iter().map(|index| &keys[*index]).collect();
            let wait = deadline.saturating_duration_since(Instant::now());
            let lease =
                self.lease_read(space, &wanted, ReadOptions { wait, ..ReadOptions::default() }).await?;
            let mut throttled = Vec::new();
            for (index, grant) in open.iter().zip(&lease.grants) {
                match grant {
                    Outcome::Granted(block) => {
                        let mut payload = vec![0; bytes];
                        match block.read_verified(&mut payload) {
                            Ok(()) => found[*index] = Some(payload),
                            Err(error) => tracing::warn!(block = %block.id(), %error, "counted as a miss"),
                        }
                    }
                    Outcome::Throttled => throttled.push(*index),
                    Outcome::Promoting | Outcome::Missing(_) | Outcome::Exists => {}
                }
            }
            lease.release().await?;
            if throttled.is_empty() {
                return Ok(found);
            }
            back_off(deadline).await?;
            open = throttled;
        }
    }

    /// Stores and seals blocks, each the child of the one before it, the first
    /// of `parent`. A block that is there already is not written again
    /// ([`SealOutcome::Already`]). When cancelled, some may have been sealed.
    ///
    /// # Errors
    /// Bad keys or payloads; [`ClientError::Throttled`] if the daemon stays over
    /// a limit; the session has ended. Some blocks may have been sealed.
    pub async fn write(
        &self,
        space: &Space,
        keys: &[impl AsRef<[u8]>],
        parent: Option<&[u8]>,
        payloads: &[impl AsRef<[u8]>],
        durability: Durability,
    ) -> Result<Vec<SealOutcome>, ClientError> {
        if keys.len() != payloads.len() {
            return Err(ClientError::Unpaired { keys: keys.len(), payloads: payloads.len() });
        }
        let payloads: Vec<&[u8]> = payloads.iter().map(AsRef::as_ref).collect();
        let expected = space.block_bytes().get();
        for (index, payload) in payloads.iter().enumerate() {
            let found = payload.len() as u64;
            if found != expected {
                return Err(ClientError::WrongLength { index, found, expected });
            }
        }
        match &self.inner.backend {
            Backend::Grpc(link) => {
                let keys = self.keys(space, keys)?;
                write_stream(link, space, &keys, parent_to_wire(parent)?, &payloads, durability).await
            }
            Backend::Lane(_) => {
                let put = Put { space, keys, parent, payloads: &payloads, durability };
                self.write_lane(&put).await
            }
        }
    }
}

pub(crate) async fn back_off(deadline: Instant) -> Result<(), ClientError> {
    if Instant::now() + THROTTLED_DELAY > deadline {
        return Err(ClientError::Throttled { message: "no room until the deadline".to_owned() });
    }
    tokio::time::sleep(THROTTLED_DELAY).await;
    Ok(())
}

pub(crate) fn batch_blocks(space: &Space) -> usize {
    let blocks = BATCH_BYTES / space.frame_bytes().get().max(1);
    usize::try_from(blocks).unwrap_or(usize::MAX).clamp(1, 1024)
}

fn index_u32(index: usize) -> Result<u32, ClientError> {
    u32::try_from(index).map_err(|_| ClientError::TooManyBlocks { found: index, limit: u32::MAX as usize })
}

fn block_bytes(space: &Space) -> Result<usize, ClientError> {
    usize::try_from(space.block_bytes().get())
        .map_err(|_| ClientError::Protocol { detail: "a block longer than this machine's memory" })
}

async fn read_stream(
    link: &GrpcLink,
    space: &Space,
    keys: &[Bytes],
    wait: Duration,
) -> Result<Vec<Option<Vec<u8>>>, ClientError> {
    let mut attempt = 1;
    loop {
        let request = ReadRequest { space: space.handle(), keys: keys.to_vec(), wait_ms: millis(wait) };
        let mut assembly = Assembly::new(space, keys)?;
        match read_pieces(link, request, wait, &mut assembly).await? {
            Ok(()) => return assembly.finish(),
            Err(status) if status.code() == Code::Unavailable && attempt < ATTEMPTS_MAX => attempt += 1,
            Err(status) => return Err(link.failed(status)),
        }
    }
}

/// Takes pieces to the stream's end. A stream may last, but not stand still.
async fn read_pieces(
    link: &GrpcLink,
    request: ReadRequest,
    wait: Duration,
    assembly: &mut Assembly<'_>,
) -> Result<Result<(), tonic::Status>, ClientError> {
    let mut pieces = match link.within(wait, link.read(request)).await? {
        Ok(pieces) => pieces,
        Err(status) => return Ok(Err(status)),
    };
    loop {
        match link.within(wait, pieces.message()).await? {
            Ok(Some(piece)) => assembly.take(piece),
            Ok(None) => return Ok(Ok(())),
            Err(status) => return Ok(Err(status)),
        }
    }
}

/// Puts the pieces of a read stream together and judges them.
struct Assembly<'a> {
    space: &'a Space,
    keys: &'a [Bytes],
    bytes: usize,
    found: Vec<Option<Vec<u8>>>,
    sums: Vec<Checksum>,
    wrong: Option<&'static str>,
    throttled: bool,
}

impl<'a> Assembly<'a> {
    fn new(space: &'a Space, keys: &'a [Bytes]) -> Result<Self, ClientError> {
        Ok(Self {
            space,
            keys,
            bytes: block_bytes(space)?,
            found: vec![None; keys.len()],
            sums: vec![Checksum::new(0); keys.len()],
            wrong: None,
            throttled: false,
        })
    }

    fn take(&mut self, piece: ReadResponse) {
        match piece.outcome() {
            GrantOutcome::Granted => {}
            GrantOutcome::Throttled => {
                self.throttled = true;
                return;
            }
            GrantOutcome::Promoting | GrantOutcome::Missing => return,
            GrantOutcome::Exists | GrantOutcome::Unspecified => {
                self.wrong = Some("a piece of a read without an outcome");
                return;
            }
        }
        let at = piece.index as usize;
        let Some(target) = self.found.get_mut(at) else {
            self.wrong = Some("a piece of a block that was not asked for");
            return;
        };
        let payload = target.get_or_insert_with(|| Vec::with_capacity(self.bytes));
        if piece.offset != payload.len() as u64 || payload.len() + piece.data.len() > self.bytes {
            self.wrong = Some("pieces of a block with a gap or an overlap");
            return;
        }
        payload.extend_from_slice(&piece.data);
        self.sums[at] = Checksum::new(piece.checksum);
    }

    fn finish(mut self) -> Result<Vec<Option<Vec<u8>>>, ClientError> {
        if let Some(detail) = self.wrong {
            return Err(ClientError::Protocol { detail });
        }
        if self.throttled {
            return Err(ClientError::Throttled { message: "too many reads at once".to_owned() });
        }
        for (at, slot) in self.found.iter_mut().enumerate() {
            let Some(payload) = slot else { continue };
            let block = self.space.block_id(&self.keys[at]);
            // A short payload was cut off on the way: its fence moved.
            let whole = payload.len() == self.bytes;
            if !whole || fold::checksum(block, self.space.generation(), payload) != self.sums[at] {
                tracing::warn!(%block, whole, "counted as a miss: not the bytes that were sealed");
                *slot = None;
            }
        }
        Ok(self.found)
    }
}

async fn write_stream(
    link: &GrpcLink,
    space: &Space,
    keys: &[Bytes],
    parent_key: Bytes,
    payloads: &[&[u8]],
    durability: Durability,
) -> Result<Vec<SealOutcome>, ClientError> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let header = WriteHeader {
        request_id: link.request_id(),
        space: space.handle(),
        keys: keys.to_vec(),
        parent_key,
        durability: durability_to_wire(durability),
    };
    let mut attempt = 1;
    loop {
        let (parts, queue) = mpsc::channel(PIECES_WAITING_MAX);
        let mut writing = pin!(link.write(queue));
        let (mut fed, mut answer) = (Ok(()), None);
        tokio::select! {
            early = &mut writing => answer = Some(early),
            done = feed(link, parts, header.clone(), space, payloads) => fed = done,
        }
        if let Err(error @ ClientError::NoAnswer { .. }) = fed {
            return Err(error);
        }
        let answer = match answer {
            Some(answer) => answer,
            None => link.within(WRITE_WAIT, writing).await?,
        };
        match answer {
            Ok(answer) => {
                let outcomes = seals_from_wire(answer.outcomes())?;
                if outcomes.len() != keys.len() {
                    return Err(ClientError::Protocol { detail: "a write that does not answer each block" });
                }
                return Ok(outcomes);
            }
            Err(status) if status.code() == Code::Unavailable && attempt < ATTEMPTS_MAX => attempt += 1,
            Err(status) => {
                // Who stopped listening says why.
                tracing::debug!(fed = fed.is_ok(), %status, "write stream failed");
                return Err(link.failed(status));
            }
        }
    }
}

async fn feed(
    link: &GrpcLink,
    parts: mpsc::Sender<WriteRequest>,
    header: WriteHeader,
    space: &Space,
    payloads: &[&[u8]],
) -> Result<(), ClientError> {
    let keys = header.keys.clone();
    let send = async |part| {
        let sent = link.within(WRITE_WAIT, parts.send(WriteRequest { part: Some(part) })).await?;
        sent.map_err(|_| ClientError::Disconnected)
    };
    send(Part::Header(header)).await?;
    for (at, payload) in payloads.iter().enumerate() {
        let index = index_u32(at)?;
        let sum = fold::checksum(space.block_id(&keys[at]), space.generation(), payload).get();
        let mut offset = 0;
        for piece in payload.chunks(PIECE_BYTES) {
            let end = offset + piece.len();
            let checksum = (end == payload.len()).then_some(sum);
            let data = Bytes::copy_from_slice(piece);
            send(Part::Piece(WritePiece { index, offset: offset as u64, data, checksum })).await?;
            offset = end;
        }
    }
    Ok(())
}
