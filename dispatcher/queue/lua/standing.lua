-- How containers stand to their tasks. ARGV: pairs of task id and attempt.
-- Returns per pair: current (the attempt that the open task is at); stale (the task has ended or
-- is at a later attempt); unknown (there is no record of it).

local answers = {}
for i = 1, #ARGV, 2 do
  local r = fields_of(ARGV[i], 'state', 'attempt')
  if r[1] == '' then
    answers[#answers + 1] = 'unknown'
  elseif ENDED[r[1]] or tonumber(r[2]) > tonumber(ARGV[i + 1]) then
    answers[#answers + 1] = 'stale'
  else
    answers[#answers + 1] = 'current'
  end
end
return answers
