//! The bytes of ZMTP: the greeting, frames and commands.

use bytes::{BufMut, Bytes, BytesMut};

use super::{Kind, LinkError};

/// Bytes of a greeting.
pub(crate) const GREETING_BYTES: usize = 64;
/// More frames of the same message follow.
pub(crate) const MORE: u8 = 1;
/// The length has eight bytes.
pub(crate) const LONG: u8 = 2;
/// It is a command.
pub(crate) const COMMAND: u8 = 4;

/// Ours: version 3.0, so that peers subscribe by messages, and NULL.
pub(crate) fn greeting() -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    (bytes[0], bytes[9]) = (0xff, 0x7f);
    bytes[10] = 3;
    bytes[12..16].copy_from_slice(b"NULL");
    bytes
}

/// Whether we can talk to a peer that greets so.
pub(crate) fn check_greeting(bytes: &[u8; GREETING_BYTES]) -> Result<(), LinkError> {
    if bytes[0] != 0xff || bytes[9] & 1 == 0 {
        return Err(LinkError::Peer("does not speak ZMTP"));
    }
    if bytes[10] < 3 {
        return Err(LinkError::Peer("speaks a version of ZMTP before 3.0"));
    }
    if bytes[12..32] != *b"NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0" {
        return Err(LinkError::Peer("wants a mechanism that is not NULL"));
    }
    Ok(())
}

/// One frame.
pub(crate) fn put_frame(bytes: &mut BytesMut, flags: u8, body: &[u8]) {
    match u8::try_from(body.len()) {
        Ok(short) => bytes.extend_from_slice(&[flags, short]),
        Err(_) => {
            bytes.put_u8(flags | LONG);
            bytes.put_u64(body.len() as u64);
        }
    }
    bytes.extend_from_slice(body);
}

/// All frames of a message.
pub(crate) fn put_message(bytes: &mut BytesMut, message: &[Bytes]) {
    for (index, frame) in message.iter().enumerate() {
        put_frame(bytes, if index + 1 < message.len() { MORE } else { 0 }, frame);
    }
}

/// The command by which a peer says what it is.
pub(crate) fn put_ready(bytes: &mut BytesMut, kind: Kind) {
    let mut body = BytesMut::new();
    put_name(&mut body, b"READY");
    put_property(&mut body, b"Socket-Type", kind.name().as_bytes());
    if matches!(kind, Kind::Dealer | Kind::Router) {
        put_property(&mut body, b"Identity", b"");
    }
    put_frame(bytes, COMMAND, &body);
}

fn put_name(body: &mut BytesMut, name: &[u8]) {
    body.put_u8(u8::try_from(name.len()).expect("our own words are short"));
    body.extend_from_slice(name);
}

fn put_property(body: &mut BytesMut, name: &[u8], value: &[u8]) {
    put_name(body, name);
    body.put_u32(u32::try_from(value.len()).expect("our own words are short"));
    body.extend_from_slice(value);
}

/// What a peer commands.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command<'a> {
    /// It is ready, and a socket of this kind.
    Ready(&'a [u8]),
    /// It wants what begins so.
    Subscribe(&'a [u8]),
    /// It no longer wants what begins so.
    Cancel(&'a [u8]),
    /// It wants these bytes back.
    Ping(&'a [u8]),
    /// It will not talk to us.
    Error,
    /// Something that needs no answer.
    Other,
}

/// Reads a command's body.
pub(crate) fn command(body: &[u8]) -> Result<Command<'_>, LinkError> {
    const CUT: LinkError = LinkError::Peer("sent a command that ends in the middle");
    let (length, rest) = body.split_first().ok_or(CUT)?;
    let (name, rest) = rest.split_at_checked(usize::from(*length)).ok_or(CUT)?;
    Ok(match name {
        b"READY" => Command::Ready(property(rest, b"socket-type").ok_or(CUT)?.unwrap_or(b"")),
        b"SUBSCRIBE" => Command::Subscribe(rest),
        b"CANCEL" => Command::Cancel(rest),
        // Two bytes of time to live come first.
        b"PING" => Command::Ping(rest.get(2..).ok_or(CUT)?),
        b"ERROR" => Command::Error,
        _ => Command::Other,
    })
}

/// The answer to a ping.
pub(crate) fn put_pong(bytes: &mut BytesMut, context: &[u8]) {
    let mut body = BytesMut::new();
    put_name(&mut body, b"PONG");
    body.extend_from_slice(context);
    put_frame(bytes, COMMAND, &body);
}

/// A property's value; names have no case. The outer none means that the list is cut.
fn property<'a>(mut list: &'a [u8], wanted: &[u8]) -> Option<Option<&'a [u8]>> {
    let mut found = None;
    while let Some((length, rest)) = list.split_first() {
        let (name, rest) = rest.split_at_checked(usize::from(*length))?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let (value, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        if name.eq_ignore_ascii_case(wanted) {
            found = Some(value);
        }
        list = rest;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A peer that sends a cut or strange command must be refused, not panic: every prefix of a whole one, and
    /// every one with a byte changed.
    #[test]
    fn commands_are_read_whole_or_refused() {
        let mut bytes = BytesMut::new();
        put_ready(&mut bytes, Kind::Dealer);
        assert_eq!(bytes[0], COMMAND);
        let body = &bytes[2..];
        assert_eq!(command(body).unwrap(), Command::Ready(b"DEALER"));
        let whole = [6, 6 + 1 + 11 + 4 + 6, body.len()];
        for cut in 0..body.len() {
            let is_whole = whole.contains(&cut);
            assert_eq!(command(&body[..cut]).is_ok(), is_whole, "cut at {cut}");
        }
        for place in 0..body.len() {
            for bits in 0..=255 {
                let mut changed = body.to_vec();
                changed[place] = bits;
                let _ = command(&changed);
            }
        }
        assert_eq!(command(b"\x04PING\0\x0ahello").unwrap(), Command::Ping(b"hello"));
        assert_eq!(command(b"\x09SUBSCRIBEkv@").unwrap(), Command::Subscribe(b"kv@"));
        assert!(command(b"\x04PING\0").is_err());
    }

    /// A peer of an old version or another mechanism would be misread: only 3.x and NULL pass.
    #[test]
    fn other_greetings_are_refused() {
        let ours = greeting();
        check_greeting(&ours).unwrap();
        for (place, bits) in [(0, 0), (9, 0), (10, 2), (12, b'P'), (16, b'X')] {
            let mut other = ours;
            other[place] = bits;
            assert!(check_greeting(&other).is_err(), "byte {place}");
        }
    }
}
