//! Texts survive the way to tokens and back.

use super::*;
use crate::chat::Message;
use crate::tiny::TinyModel;

fn tiny() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    TinyModel::default().write(&path).unwrap();
    Tokenizer::open(&path).unwrap()
}

// A byte that is lost or merged wrongly would change a prompt silently: encode
// texts of all kinds, and all single bytes, and decode them again.
#[test]
fn round_trip() {
    let tokenizer = tiny();
    for text in
        ["", "the cat and the dog", "  two  spaces\n\ttab", "1234", "na\u{ef}ve \u{1f600} \u{4f60}\u{597d}"]
    {
        let tokens = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&tokens), text);
    }
    assert_eq!(tokenizer.encode(" the").unwrap(), [tokenizer.token("\u{120}the").unwrap()]);
    assert_eq!(tokenizer.ends(), [256, 258]);
}

// A character split over tokens must not be streamed in halves, nor held back
// for ever: push the bytes of an emoji, a broken character, and an ASCII letter.
#[test]
fn stream_holds_back_split_characters() {
    let tokenizer = tiny();
    let mut stream = tokenizer.decode_stream();
    let emoji = "\u{1f600}";
    let texts: Vec<String> = emoji.bytes().map(|byte| stream.push(u32::from(byte))).collect();
    assert_eq!(texts, ["", "", "", emoji]);
    assert_eq!(stream.push(0xF0), "");
    assert_eq!(stream.push(u32::from(b'a')), "\u{fffd}a");
    assert_eq!(stream.push(0x9F), "\u{fffd}");
    assert_eq!(stream.push(0xE4), "");
    assert_eq!(stream.push(999_999), "", "an unknown token adds nothing");
    assert_eq!(stream.finish(), "\u{fffd}");
}

// The template's markers must become single tokens, or the model would not see
// turns.
#[test]
fn chat_markers_are_tokens() {
    let tokenizer = tiny();
    let messages = [Message { role: "user".to_owned(), content: "the".to_owned() }];
    let prompt = tokenizer.chat().unwrap().render(&messages).unwrap();
    assert_eq!(prompt, "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n");
    let tokens = tokenizer.encode_chat(&prompt).unwrap();
    assert_eq!(tokens.iter().filter(|token| **token == 257).count(), 2);
    assert_eq!(tokens.iter().filter(|token| **token == 258).count(), 1);
}
