//! The grammar of grub.cfg: words, lists, `if`, blocks, functions.

use std::rc::Rc;

/// Blocks within blocks; `grub-mkconfig` makes four.
const MAX_DEPTH: u32 = 32;

/// A part of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Text { text: String, quoted: bool },
    Variable { name: String, quoted: bool },
}

/// What becomes one argument, or several if a bare variable holds spaces.
pub(super) type Word = Vec<Piece>;

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Simple(Vec<Word>),
    /// `menuentry … { … }` and whatever else has a block.
    Block(Vec<Word>, Rc<Vec<Command>>),
    /// Conditions with their consequences, then the rest.
    If(Vec<(Vec<Command>, Vec<Command>)>, Vec<Command>),
    /// A function or a loop, which are not run.
    Skipped(Option<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(Word),
    End,
    Open,
    Close,
}

/// Parses a configuration file.
pub(super) fn parse(text: &str) -> Result<Vec<Command>, String> {
    let tokens = Lexer::new(text).tokens()?;
    let mut parser = Parser {
        tokens: tokens.into_iter().peekable(),
        depth: 0,
    };
    let commands = parser.list(&[])?;
    match parser.tokens.next() {
        None => Ok(commands),
        Some(token) => Err(format!("unexpected {}", describe(&token))),
    }
}

fn describe(token: &Token) -> String {
    match token {
        Token::Word(word) => format!("'{}'", keyword(word).unwrap_or("word")),
        Token::End => "end of command".into(),
        Token::Open => "'{'".into(),
        Token::Close => "'}'".into(),
    }
}

/// The text of a word that is bare text only.
pub(super) fn keyword(word: &Word) -> Option<&str> {
    match word.as_slice() {
        [
            Piece::Text {
                text,
                quoted: false,
            },
        ] => Some(text),
        _ => None,
    }
}

struct Lexer<'a> {
    rest: std::iter::Peekable<std::str::Chars<'a>>,
    tokens: Vec<Token>,
    word: Word,
}

impl<'a> Lexer<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            rest: text.chars().peekable(),
            tokens: Vec::new(),
            word: Word::new(),
        }
    }

    fn tokens(mut self) -> Result<Vec<Token>, String> {
        while let Some(c) = self.rest.next() {
            match c {
                '\n' | ';' => self.end_word(Some(Token::End)),
                '{' => self.end_word(Some(Token::Open)),
                '}' => self.end_word(Some(Token::Close)),
                '#' if self.word.is_empty() => while self.rest.next_if(|c| *c != '\n').is_some() {},
                c if c.is_whitespace() => self.end_word(None),
                '\'' => self.single_quoted()?,
                '"' => self.double_quoted()?,
                '$' => self.variable(false),
                '\\' => match self.rest.next() {
                    Some('\n') | None => {}
                    Some(c) => self.text(c, true),
                },
                c => self.text(c, false),
            }
        }
        self.end_word(Some(Token::End));
        Ok(self.tokens)
    }

    fn end_word(&mut self, token: Option<Token>) {
        if !self.word.is_empty() {
            self.tokens
                .push(Token::Word(std::mem::take(&mut self.word)));
        }
        self.tokens.extend(token);
    }

    fn text(&mut self, c: char, quote: bool) {
        match self.word.last_mut() {
            Some(Piece::Text { text, quoted }) if *quoted == quote => text.push(c),
            _ => self.word.push(Piece::Text {
                text: c.into(),
                quoted: quote,
            }),
        }
    }

    fn single_quoted(&mut self) -> Result<(), String> {
        let mut text = String::new();
        loop {
            match self.rest.next().ok_or("a quote is not closed")? {
                '\'' => break,
                c => text.push(c),
            }
        }
        self.word.push(Piece::Text { text, quoted: true });
        Ok(())
    }

    fn double_quoted(&mut self) -> Result<(), String> {
        // An empty string is a word, too.
        self.word.push(Piece::Text {
            text: String::new(),
            quoted: true,
        });
        loop {
            match self.rest.next().ok_or("a quote is not closed")? {
                '"' => return Ok(()),
                '$' => self.variable(true),
                '\\' => match self.rest.next() {
                    Some('\n') | None => {}
                    Some(c @ ('$' | '"' | '\\')) => self.text(c, true),
                    Some(c) => {
                        self.text('\\', true);
                        self.text(c, true);
                    }
                },
                c => self.text(c, true),
            }
        }
    }

    /// What follows a dollar sign; the sign itself, if it is no name.
    fn variable(&mut self, quoted: bool) {
        let mut name = String::new();
        if self.rest.next_if_eq(&'{').is_some() {
            while let Some(c) = self.rest.next_if(|c| *c != '}' && *c != '\n') {
                name.push(c);
            }
            self.rest.next_if_eq(&'}');
        } else if let Some(c) = self.rest.next_if(|c| "?@*#0123456789".contains(*c)) {
            name.push(c);
        } else {
            while let Some(c) = self
                .rest
                .next_if(|c| c.is_ascii_alphanumeric() || *c == '_')
            {
                name.push(c);
            }
        }
        if name.is_empty() {
            self.text('$', quoted);
        } else {
            self.word.push(Piece::Variable { name, quoted });
        }
    }
}

struct Parser {
    tokens: std::iter::Peekable<std::vec::IntoIter<Token>>,
    depth: u32,
}

impl Parser {
    /// Commands up to a closing brace, or to one of `ends` where a command would start.
    fn list(&mut self, ends: &[&str]) -> Result<Vec<Command>, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err("blocks are nested too deeply".into());
        }
        let mut commands = Vec::new();
        while let Some(token) = self.tokens.peek() {
            match token {
                Token::Close => break,
                Token::End => {
                    self.tokens.next();
                }
                Token::Word(word) if keyword(word).is_some_and(|word| ends.contains(&word)) => {
                    break;
                }
                _ => commands.push(self.command()?),
            }
        }
        self.depth -= 1;
        Ok(commands)
    }

    fn command(&mut self) -> Result<Command, String> {
        let mut words = Vec::new();
        while let Some(token) = self.tokens.next() {
            match token {
                Token::Word(word) if words.is_empty() => match keyword(&word) {
                    Some("if") => return self.conditional(),
                    Some("function") => return self.function(),
                    Some("for" | "while" | "until") => return self.repetition(),
                    _ => words.push(word),
                },
                Token::Word(word) => words.push(word),
                Token::End => break,
                Token::Open => return Ok(Command::Block(words, Rc::new(self.block()?))),
                Token::Close => return Err("unexpected '}'".into()),
            }
            if self.tokens.peek() == Some(&Token::Close) {
                break;
            }
        }
        Ok(Command::Simple(words))
    }

    /// What follows an opening brace.
    fn block(&mut self) -> Result<Vec<Command>, String> {
        let commands = self.list(&[])?;
        match self.tokens.next() {
            Some(Token::Close) => Ok(commands),
            _ => Err("a '{' is not closed".into()),
        }
    }

    /// Takes the word that `list` stopped at.
    fn expect(&mut self, words: &[&str]) -> Result<String, String> {
        match self.tokens.next() {
            Some(Token::Word(word)) if keyword(&word).is_some_and(|word| words.contains(&word)) => {
                Ok(keyword(&word).unwrap_or_default().to_owned())
            }
            Some(token) => Err(format!("{} instead of {words:?}", describe(&token))),
            None => Err(format!("it ends where one of {words:?} belongs")),
        }
    }

    fn conditional(&mut self) -> Result<Command, String> {
        let mut arms = Vec::new();
        loop {
            let condition = self.list(&["then"])?;
            self.expect(&["then"])?;
            arms.push((condition, self.list(&["elif", "else", "fi"])?));
            match self.expect(&["elif", "else", "fi"])?.as_str() {
                "elif" => {}
                "else" => {
                    let otherwise = self.list(&["fi"])?;
                    self.expect(&["fi"])?;
                    return Ok(Command::If(arms, otherwise));
                }
                _ => return Ok(Command::If(arms, Vec::new())),
            }
        }
    }

    fn function(&mut self) -> Result<Command, String> {
        let name = match self.tokens.next() {
            Some(Token::Word(word)) => keyword(&word).map(str::to_owned),
            _ => None,
        };
        while self.tokens.next_if_eq(&Token::End).is_some() {}
        match self.tokens.next() {
            Some(Token::Open) => self.block()?,
            _ => return Err("a function has no '{'".into()),
        };
        Ok(Command::Skipped(name))
    }

    fn repetition(&mut self) -> Result<Command, String> {
        self.list(&["do"])?;
        self.expect(&["do"])?;
        self.list(&["done"])?;
        self.expect(&["done"])?;
        Ok(Command::Skipped(None))
    }
}
