-- Makes dead letters tasks again. ARGV per letter:
--   entry, id, digest, document, queue, expires_ms.
-- The id is the letter's alone, so that asking again makes no second task.
-- Returns per letter {verdict, id, limit}: new; known (it was made a task before); gone; or why its
-- queue takes no task. The letter goes with the first two only.

local DEAD = BASE .. 'dead'
local FIELDS = 6

local function letter_of(entry)
  local found = redis.call('XRANGE', DEAD, entry, entry)[1]
  if not found then
    return nil
  end
  local letter = {}
  for i = 1, #found[2], 2 do
    letter[found[2][i]] = found[2][i + 1]
  end
  return letter
end

local function revive(entry, id, digest, document, queue, expires)
  if redis.call('EXISTS', record_key(id)) == 1 then
    return { 'known', id }
  end
  local letter = letter_of(entry)
  if not letter then
    return { 'gone', id }
  end
  local refused, limit = refusal_of(queue, document)
  if refused then
    return { refused, id, limit }
  end
  local original = letter.id or '' -- none in what somebody put there by hand
  record(id, document, digest, queue, expires, { 'key', '', 'traceparent', letter.traceparent or '',
    'tracestate', fields_of(original, 'tracestate')[1], 'retry_of', original })
  append(id, queue)
  if redis.call('EXISTS', record_key(original)) == 1 then
    redis.call('HSET', record_key(original), 'retried_as', id)
  end
  redis.call('XDEL', DEAD, entry)
  return { 'new', id }
end

local answers = {}
for i = 1, #ARGV, FIELDS do
  answers[#answers + 1] = revive(unpack(ARGV, i, i + FIELDS - 1))
end
return answers
