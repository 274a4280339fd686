//! Frames and descriptors over a real socket pair; garbage, limits, short reads.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream as StdStream;

use terrace_proto::v1::{LeaseRequest, MapChunk, MappedChunk, lane_request};

use super::*;
use crate::LaneConnection;

type Daemon = (LaneReader<LaneRequest>, LaneWriter<LaneResponse>);
type Client = (LaneReader<LaneResponse>, LaneWriter<LaneRequest>);

fn pair() -> (Daemon, Client) {
    let (left, right) = StdStream::pair().unwrap();
    let (_, reader, writer) = LaneConnection::from_stream(left).unwrap().split();
    let daemon = (reader, writer);
    let (_, reader, writer) = LaneConnection::from_stream(right).unwrap().split();
    (daemon, (reader, writer))
}

fn daemon_and_raw() -> (Daemon, StdStream) {
    let (left, right) = StdStream::pair().unwrap();
    let (_, reader, writer) = LaneConnection::from_stream(left).unwrap().split();
    ((reader, writer), right)
}

fn request(id: u64, keys: usize) -> LaneRequest {
    let lease = LeaseRequest { request_id: id, keys: vec![vec![9; 64].into(); keys], ..Default::default() };
    LaneRequest { id, op: Some(lane_request::Op::Lease(lease)) }
}

fn mapped(chunk: u64) -> LaneResponse {
    let answer = MappedChunk { chunk, bytes: 4096, fence_bytes: 4096, ..Default::default() };
    LaneResponse { id: chunk, result: Some(lane_response::Result::MappedChunk(answer)) }
}

// Two descriptors that can be told apart: pipes whose other ends hold a letter.
fn letters(pair: [u8; 2]) -> Vec<OwnedFd> {
    pair.iter()
        .map(|letter| {
            let (reader, mut writer) = io::pipe().unwrap();
            writer.write_all(&[*letter]).unwrap();
            OwnedFd::from(reader)
        })
        .collect()
}

fn letter_of(descriptor: OwnedFd) -> u8 {
    let mut letter = [0];
    std::fs::File::from(descriptor).read_exact(&mut letter).unwrap();
    letter[0]
}

// Frames that straddle receives or fill the socket could be torn: send many of
// all sizes at once, more than the kernel buffers, and compare each.
#[tokio::test]
async fn many_messages_arrive_whole() {
    let ((mut reader, _keep), (_reader, mut writer)) = pair();
    let sizes: Vec<usize> = (0..400).map(|at| [0, 1, 7, 900][at % 4]).collect();
    let expected: Vec<LaneRequest> = sizes.iter().zip(1..).map(|(keys, id)| request(id, *keys)).collect();
    for message in &expected {
        writer.queue(message, Vec::new()).unwrap();
    }
    let sending = tokio::spawn(async move {
        writer.flush().await.unwrap();
        writer
    });
    for message in &expected {
        assert_eq!(reader.next().await.unwrap().unwrap().message, *message);
    }
    drop(sending.await.unwrap());
    drop(_reader);
    assert!(reader.next().await.unwrap().is_none(), "a clean end is no error");
}

// Descriptors could end up with the wrong message when several answers leave
// together: interleave answers with and without, queue all, and read letters.
#[tokio::test]
async fn descriptors_stay_with_their_message() {
    let ((_r, mut writer), (mut reader, _w)) = pair();
    let plain = LaneResponse { id: 77, result: None };
    for round in 0..20u8 {
        writer.queue(&plain, Vec::new()).unwrap();
        writer.queue(&mapped(u64::from(round) + 1), letters([round, 100 + round])).unwrap();
    }
    writer.flush().await.unwrap();
    for round in 0..20u8 {
        let received = reader.next().await.unwrap().unwrap();
        assert_eq!((received.message.id, received.descriptors.len()), (77, 0));
        let received = reader.next().await.unwrap().unwrap();
        assert_eq!(received.message, mapped(u64::from(round) + 1));
        let found: Vec<u8> = received.descriptors.into_iter().map(letter_of).collect();
        assert_eq!(found, [round, 100 + round]);
    }
}

// A received descriptor must not leak into children of this process.
#[tokio::test]
async fn received_descriptors_are_close_on_exec() {
    let ((_r, mut writer), (mut reader, _w)) = pair();
    writer.queue(&mapped(1), letters([1, 2])).unwrap();
    writer.flush().await.unwrap();
    for descriptor in reader.next().await.unwrap().unwrap().descriptors {
        // SAFETY: no pointers are involved.
        let flags = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_GETFD) };
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }
}

// A frame that announces more than the limit must be refused from its length
// alone, before anything is allocated for it.
#[tokio::test]
async fn oversized_frames_are_refused_by_their_length() {
    let ((mut reader, _w), mut raw) = daemon_and_raw();
    raw.write_all(&u32::MAX.to_le_bytes()).unwrap();
    drop(raw);
    let error = reader.next().await.unwrap_err();
    assert!(matches!(error, LaneError::FrameTooLong { found, .. } if found == u32::MAX as usize));
    assert!(reader.buffer.capacity() < 1 << 20);
}

// A message of ours over the limit would be refused by the peer and cost the
// connection: it must fail alone, and the next one must pass.
#[tokio::test]
async fn a_message_over_the_limit_is_not_sent() {
    let ((mut reader, _w), (_r, mut writer)) = pair();
    let huge = request(1, MESSAGE_BYTES_MAX / 64);
    assert!(matches!(writer.queue(&huge, Vec::new()), Err(LaneError::MessageTooLong { .. })));
    writer.queue(&request(2, 1), Vec::new()).unwrap();
    writer.flush().await.unwrap();
    assert_eq!(reader.next().await.unwrap().unwrap().message.id, 2);
}

// Bytes that are no message must be an error, never a panic or a hang: a good
// length followed by garbage, for many garbages.
#[tokio::test]
async fn garbage_is_an_error() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..200 {
        let ((mut reader, _w), mut raw) = daemon_and_raw();
        let mut frame = vec![0xff; 1];
        for _ in 0..60 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            frame.push(seed.to_le_bytes()[0]);
        }
        raw.write_all(&u32::try_from(frame.len()).unwrap().to_le_bytes()).unwrap();
        raw.write_all(&frame).unwrap();
        drop(raw);
        assert!(matches!(reader.next().await, Err(LaneError::Garbage(_))), "seed {seed}");
    }
}

// A peer that dies in the middle of a frame must not look like a clean end.
#[tokio::test]
async fn a_torn_frame_is_no_clean_end() {
    let ((mut reader, _w), mut raw) = daemon_and_raw();
    raw.write_all(&[9, 0, 0, 0, 1, 2]).unwrap();
    drop(raw);
    assert!(matches!(reader.next().await, Err(LaneError::Truncated)));
}

// A client could fill the daemon's table of descriptors: those that no message
// asks for must end the connection.
#[tokio::test]
async fn unasked_descriptors_are_refused() {
    let ((mut reader, _w), raw) = daemon_and_raw();
    let op = lane_request::Op::MapChunk(MapChunk { chunk: 1 });
    let message = LaneRequest { id: 1, op: Some(op) }.encode_to_vec();
    let mut frame = u32::try_from(message.len()).unwrap().to_le_bytes().to_vec();
    frame.extend(message);
    syscall::send(raw.as_fd(), &frame, &letters([1, 2])).unwrap();
    assert!(matches!(reader.next().await, Err(LaneError::Descriptors { .. })));
}

// An answer that should bring descriptors and does not must not reach the caller.
#[tokio::test]
async fn missing_descriptors_are_refused() {
    let (left, mut raw) = StdStream::pair().unwrap();
    let connection = LaneConnection::<LaneResponse, LaneRequest>::from_stream(left).unwrap();
    let (_, mut reader, _w) = connection.split();
    let message = mapped(1).encode_to_vec();
    raw.write_all(&u32::try_from(message.len()).unwrap().to_le_bytes()).unwrap();
    raw.write_all(&message).unwrap();
    assert!(matches!(reader.next().await, Err(LaneError::Descriptors { .. })));
}
